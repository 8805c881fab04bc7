"""One measurement of the grid by name, and the filters that choose them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from qlora_kernels.backends.registry import OPS, KernelEntry, Problem, entries
from qlora_kernels.errors import argument_error
from qlora_kernels.formats import Format, get_format, list_formats

# After a format's name: the same with fp32 scales instead of its own double quantization.
PLAIN = "+fp32"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Weights of a dequantize_many and of a group: as many as q, k and v.
MANY = 3
# A whole layer, forward and backward: what a training step repeats.
LAYER = "lora_layer"
# Layers that share x, as q, k and v do.
GROUP = "lora_group"
# Grid op -> the registry's ops that it runs, where it is not one of them.
COMPOSITE = {
    LAYER: ("qlora_linear", "qlora_linear_backward"),
    GROUP: ("qlora_group", "qlora_group_backward"),
}
# Ops of the registry that are measured as a part of another.
WITHOUT_CASE = frozenset(COMPOSITE[GROUP])
GRID_OPS = (
    *(op for op in OPS if op not in WITHOUT_CASE),
    # With --base an older package may lack them.
    *(name for name, ops in COMPOSITE.items() if set(ops) <= set(OPS)),
)
WITH_RANK = frozenset({"qlora_linear", "qlora_linear_backward", *COMPOSITE})
WITH_TOKENS = WITH_RANK | {"quantized_matmul", "quantized_matmul_backward_input", "dropout"}
WITHOUT_FORMAT = frozenset({"double_quantize", "dropout"})


def storage(name: str) -> Format:
    """The Format of a point's name; nf4 for "-"."""
    if name.endswith(PLAIN):
        return get_format(name.removesuffix(PLAIN)).override(None, False)
    return get_format("nf4" if name == "-" else name)


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        op: one of `GRID_OPS`.
        backend: a registry name, e.g. "cpu:avx512".
        format: a registered format, also with `PLAIN` behind it; "-" where an op has none.
        dtype: "fp32", "fp16" or "bf16": of x, or of the dense weight.
        layer: name of the shape; N, K its sizes.
        M, R: tokens and rank, 0 where an op has none.
    """

    op: str
    backend: str
    format: str
    dtype: str
    layer: str
    N: int
    K: int
    M: int = 0
    R: int = 0

    @property
    def key(self) -> str:
        """A name that is the same in every run: the shape's sizes stand for its layer."""
        sizes = f"N{self.N}-K{self.K}" + (f"-M{self.M}" if self.M else "")
        rank = f"-R{self.R}" if self.R else ""
        return f"{self.op}/{self.backend}/{self.format}/{self.dtype}/{sizes}{rank}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]

    def record(self) -> dict[str, object]:
        """For the JSON record."""
        return {"key": self.key, **asdict(self)}


@dataclass(frozen=True)
class Filters:
    """Which points to measure; every field a sequence of names or sizes.

    backends: names or families; "auto" is the one that a call would take, "all" every one.
    """

    ops: Sequence[str]
    backends: Sequence[str]
    formats: Sequence[str]
    dtypes: Sequence[str]
    shapes: dict[str, tuple[int, int]]
    tokens: Sequence[int]
    ranks: Sequence[int]

    def __post_init__(self) -> None:
        for name, given, known in (
            ("only", self.ops, GRID_OPS),
            ("format", [name.removesuffix(PLAIN) for name in self.formats], list_formats()),
            ("dtype", self.dtypes, tuple(DTYPES)),
        ):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise argument_error("bench", name, f"out of {list(known)}", unknown)


def problem_of(point: Point, device_type: str, op: str | None = None) -> Problem:
    """What the registry chooses by, for one of the point's ops (its own by default)."""
    op = op or point.op
    group = op in COMPOSITE[GROUP]
    matmul = group or (op in WITH_TOKENS and op != "dropout")
    count = MANY if group else 1
    fmt = storage(point.format)
    numel = point.N * point.K
    if op == "double_quantize":
        numel //= fmt.block_size
    elif op == "dequantize_many":
        numel *= MANY
    elif op == "dropout":
        numel = point.M * point.K
    return Problem(
        op=op,
        device_type=device_type,
        dtype=point.torch_dtype,
        tokens=point.M if matmul else 0,
        out_features=count * point.N if matmul else 0,
        in_features=point.K if matmul else numel,
        rank=count * point.R if matmul else 0,
        block_size=fmt.block_size,
        double_quant=fmt.double_quant,
    )


def ops_within(op: str) -> tuple[str, ...]:
    """The registry's ops that a grid op runs."""
    return COMPOSITE.get(op, (op,))


def reason_against(point: Point, entry: KernelEntry, device_type: str) -> str | None:
    """Why a backend cannot run the point here, or None."""
    for op in ops_within(point.op):
        matching = [other for other in entries(op) if other.backend == entry.backend]
        if not matching:
            return f"has no {op}"
        reason = matching[0].reason_against(problem_of(point, device_type, op))
        if reason:
            return reason
    return None


def expand(filters: Filters, device_type: str) -> Iterator[tuple[Point, str | None]]:
    """(point, None) for each that can run here, (point, reason) for each that cannot."""
    for bare in _bare_points(filters):
        able: list[Point] = []
        for entry in entries(ops_within(bare.op)[0]):
            point = Point(**{**asdict(bare), "backend": entry.backend})
            reason = reason_against(point, entry, device_type)
            named = any(entry.matches(name) for name in filters.backends)
            if reason is None:
                able.append(point)
            if "all" in filters.backends or named:
                yield point, reason
        if "auto" in filters.backends and "all" not in filters.backends:
            if not able:
                yield bare, "no backend can run it here"
            elif not any(
                able[0].backend == name or able[0].backend.split(":")[0] == name
                for name in filters.backends
            ):
                yield able[0], None


def _bare_points(filters: Filters) -> Iterator[Point]:
    seen = set()
    for op in filters.ops:
        for layer, (rows, cols) in filters.shapes.items():
            for format_name in ("-",) if op in WITHOUT_FORMAT else filters.formats:
                for dtype in ("fp32",) if op == "double_quantize" else filters.dtypes:
                    for tokens in filters.tokens if op in WITH_TOKENS else (0,):
                        for rank in filters.ranks if op in WITH_RANK else (0,):
                            point = Point(
                                op, "auto", format_name, dtype, layer, rows, cols, tokens, rank
                            )
                            if point.key not in seen:
                                seen.add(point.key)
                                yield point
