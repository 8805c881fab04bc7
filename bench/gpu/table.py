"""Stages "table" and "layer": every target of the kernels, each backend beside its peers.

The targets are those of the design for one H200 (bytes at 4.3 TB/s, GEMMs at 790 TFLOP/s); on
another card they are context, and what counts is the share of the ceilings measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.ceilings import TINY_SIZES, measure_ceilings
from bench.gpu.context import Context
from bench.grid.points import DTYPES, LAYER, Filters, Point, expand
from bench.grid.sweep import Limits, Sweep, run_sweep
from qlora_kernels.testing.timing import clock_for

SMALL, MIDDLE, LARGE = (4096, 4096), (4096, 14336), (8192, 28672)
BOTH_STORES = ("nf4", "nf4+fp32")
LAYERS = {
    "llama-7b.q": SMALL,
    "llama-3-8b.gate": (14336, 4096),
    "llama-3-8b.down": MIDDLE,
    "llama-65b.gate": (22016, 8192),
    "llama-3-70b.down": LARGE,
}
H200 = "H200"


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        op, formats, ranks: of the points.
        shape, tokens: of the points.
        floor_us, target_us: on an H200; None where the target is a share or a ratio.
        share: of the measured ceiling that is to be reached; None where a time says it.
        of_peer: (peer's name, most times its time).
    """

    op: str
    shape: tuple[int, int]
    tokens: tuple[int, ...] = (0,)
    formats: tuple[str, ...] = ("nf4",)
    ranks: tuple[int, ...] = (0,)
    floor_us: float | None = None
    target_us: float | None = None
    share: float | None = None
    of_peer: tuple[str, float] | None = None


DENSE = "torch bf16 linear"
TARGETS = (
    Target("dequantize", MIDDLE, formats=BOTH_STORES, floor_us=35.0, target_us=41, share=0.85),
    Target("dequantize", LARGE, formats=BOTH_STORES, floor_us=140, target_us=160, share=0.85),
    Target("dequantize", SMALL, formats=BOTH_STORES, floor_us=10.0, target_us=13),
    Target("dequantize_many", SMALL, formats=BOTH_STORES),
    Target("quantize", MIDDLE, formats=BOTH_STORES, share=0.75),
    Target("double_quantize", LARGE),
    Target("quantized_matmul", SMALL, (1, 2, 4, 8), floor_us=2.2, target_us=4.5),
    Target("quantized_matmul", MIDDLE, (1, 2, 4, 8), floor_us=7.7, target_us=9.6),
    Target("quantized_matmul", LARGE, (1, 2, 4, 8), floor_us=30.7, target_us=37),
    Target("quantized_matmul", SMALL, (16,), floor_us=2.3, target_us=5),
    Target("quantized_matmul", MIDDLE, (16,), floor_us=7.8, target_us=10.4),
    Target("quantized_matmul", LARGE, (16,), floor_us=31, target_us=39),
    Target("qlora_linear", SMALL, (1, 16), ranks=(16, 64), of_peer=("ours without", 1.15)),
    Target("qlora_linear", LARGE, (1, 16), ranks=(16, 64), of_peer=("ours without", 1.15)),
    Target("quantized_matmul", LARGE, (64,), floor_us=38, target_us=52),
    Target("quantized_matmul", LARGE, (128,), floor_us=76, target_us=100),
    Target("quantized_matmul", LARGE, (256,), floor_us=152, target_us=185),
    Target("quantized_matmul", LARGE, (512, 1024)),
    Target("qlora_linear", MIDDLE, (2048,), ranks=(16, 64), of_peer=(DENSE, 1.18)),
    Target("qlora_linear", MIDDLE, (4096,), ranks=(16, 64), of_peer=(DENSE, 1.11)),
    Target("qlora_linear", MIDDLE, (8192,), ranks=(16, 64), of_peer=(DENSE, 1.07)),
    Target("quantized_matmul_backward_input", MIDDLE, (2048,), of_peer=("torch bf16 matmul", 1.18)),
    Target("quantized_matmul_backward_input", MIDDLE, (4096,), of_peer=("torch bf16 matmul", 1.11)),
    Target("quantized_matmul_backward_input", MIDDLE, (8192,), of_peer=("torch bf16 matmul", 1.07)),
    Target("qlora_linear_backward", MIDDLE, (2048, 4096, 8192), ranks=(16, 64)),
    Target("dropout", MIDDLE, (4096,)),
)
# Every peer but torch.compile, which would compile anew for each point: `bench.run --peers compile`
# measures that.
PEERS = ("torch bf16", "torch copy", "torch dropout", "torchao", "bitsandbytes", "PEFT", "our")
# The row that matters most: not slower than PEFT's LoRA layer over bf16 weights.
PEFT_RATIO = 1.0
LAYER_TOKENS = (2048, 4096, 8192, 16384)


def points_of(
    op: str,
    shapes: Mapping[str, tuple[int, int]],
    tokens: Sequence[int],
    formats: Sequence[str],
    ranks: Sequence[int],
    device_type: str,
) -> Iterator[tuple[Point, str | None]]:
    """The points of a row, for every backend of a GPU but the reference, for a CPU's best."""
    backends = ("all",) if device_type == "cuda" else ("auto",)
    filters = Filters((op,), backends, formats, ("bf16",), dict(shapes), tokens, ranks)
    for point, reason in expand(filters, device_type):
        if point.backend != "reference":
            yield point, reason


def rows(smoke: bool, device_type: str) -> Iterator[tuple[Target, Point, str | None]]:
    """(target, point, why it cannot run) of the whole table."""
    for target in TARGETS:
        small = {"tiny": (128, 128)}
        shapes = small if smoke else {"x".join(map(str, target.shape)): target.shape}
        tokens = tuple(min(count, 4) for count in target.tokens) if smoke else target.tokens
        arguments = (shapes, tokens, target.formats, target.ranks, device_type)
        for point, reason in points_of(target.op, *arguments):
            yield target, point, reason


def targets(context: Context) -> None:
    """The table; points that are measured already are left as they are."""
    found = {point["key"]: point for point in context.content.get("points", [])}
    by_key: dict[str, Target] = {}
    wanted = []
    for target, point, reason in rows(context.smoke, context.device.type):
        if point.key not in by_key:
            by_key[point.key] = target
            wanted.append((point, reason))
    measure(context, wanted, found, by_key)


def layers(context: Context) -> None:
    """A LoRA layer, forward and backward, against PEFT's."""
    found = {point["key"]: point for point in context.content.get("points", [])}
    smoke = context.smoke
    wanted = []
    for name, shape in {"tiny": (128, 128)}.items() if smoke else LAYERS.items():
        arguments = ((4,) if smoke else LAYER_TOKENS, ("nf4",), (16,) if smoke else (16, 64))
        wanted += list(points_of(LAYER, {name: shape}, *arguments, context.device.type))
    peer = ("PEFT over bf16", PEFT_RATIO)
    target = Target(LAYER, SMALL, of_peer=peer)
    measure(context, wanted, found, {point.key: target for point, _ in wanted})


def measure(
    context: Context,
    wanted: Sequence[tuple[Point, str | None]],
    found: dict[str, dict[str, Any]],
    by_key: Mapping[str, Target],
) -> None:
    """Measure what is not found yet, while there is time; keeps everything after each point."""
    clock = clock_for(context.device)
    sizes = TINY_SIZES if context.smoke else None
    rounds, seconds = (2, 0.01) if context.smoke else (30, 0.5)
    dtypes = {name: DTYPES[name] for name in ("bf16", "fp32")}
    ceilings = measure_ceilings(clock, context.device, dtypes, sizes, rounds, seconds)
    peers = ("torch bf16", "PEFT", "without") if context.smoke else PEERS

    def keep(sweep: Sweep) -> None:
        content = sweep.content()
        new = {point["key"]: judged(point, by_key[point["key"]]) for point in content["points"]}
        content["points"] = [*{**found, **new}.values()]
        context.save(ceilings=ceilings.record(), **content)

    def remaining() -> Iterator[tuple[Point, str | None]]:
        for point, reason in wanted:
            if point.key in found:
                continue
            if context.left < 0:
                return
            yield point, reason

    limits = Limits(rounds, seconds, peers)
    sweep = run_sweep(remaining(), context.device, clock, ceilings, limits, keep)
    keep(sweep)
    assert not sweep.refused, f"{len(sweep.refused)} wrong, the first: {sweep.refused[0]}"


def judged(point: dict[str, Any], target: Target) -> dict[str, Any]:
    """A point with its target, and whether it is reached; None where there is nothing to reach."""
    reached: list[bool] = []
    if target.target_us is not None:
        reached.append(point["ours_ms"]["median"] * 1e3 <= target.target_us)
    if target.share is not None:
        reached.append(point["share"] >= target.share)
    if target.of_peer is not None:
        name, most = target.of_peer
        for peer, figures in point["peers_ms"].items():
            if peer.startswith(name) and "missing" not in figures:
                reached.append(1 / figures["speedup"] <= most)
    return {
        **point,
        "target": {
            "floor_us_h200": target.floor_us,
            "target_us_h200": target.target_us,
            "share": target.share,
            "of_peer": target.of_peer,
            "reached": all(reached) if reached else None,
        },
    }
