"""QuantizedWeight: packed codes, scales, format, logical shape and dtype. A plain frozen dataclass
of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.operands import StoredOperands, WeightOperands, assemble_operands
from qlora_kernels.formats.registry import get_format
from qlora_kernels.formats.scale_store import FLOAT_STORES

__all__ = ["TENSOR_FIELDS", "WEIGHT_DTYPES", "QuantizedWeight", "StoredOperands", "WeightOperands"]

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TENSOR_FIELDS = (
    "codes",
    "absmax",
    "scale_codes",
    "scale_absmax",
    "scale_offset",
    "scale_codebook",
    "shift",
    "shift_codes",
    "shift_absmax",
    "shift_offset",
    "tables",
)
_SCALES = TENSOR_FIELDS[1:5]
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight in 4-bit (or 2- or 3-bit) storage; nf4 and fp4 in bitsandbytes' layout.

    Which tensors there are, and their sizes, is `format.tensor_sizes(shape)`; the others are None.

    Attributes:
        codes: u8 [ceil(numel/2)], element 2i in the high nibble; densely packed, see `pack_dense`.
        shape, dtype: of the weight it stands for; dtype is what dequantize returns by default.
        format: the Format with the block size and scale store actually used.
        absmax: [n_blocks] scales in fp32, fp16 or bf16.
        scale_codes, scale_absmax, scale_offset: scales in 8 bits: u8 [n_blocks], fp32 second-level
            scales (double-quantized: [ceil(n_blocks/256)]), fp32 [1].
        scale_codebook: fp32 [256] when it is not dynamic8 (a checkpoint that brings its own), else
            None.
        shift; shift_codes, shift_absmax, shift_offset: the shifts, stored as the scales are.
        tables: fp16 [L], or [N·L] with a table per row, learned for this weight, ascending.
    """

    codes: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format
    absmax: torch.Tensor | None = None
    scale_codes: torch.Tensor | None = None
    scale_absmax: torch.Tensor | None = None
    scale_offset: torch.Tensor | None = None
    scale_codebook: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    shift_codes: torch.Tensor | None = None
    shift_absmax: torch.Tensor | None = None
    shift_offset: torch.Tensor | None = None
    tables: torch.Tensor | None = None

    @classmethod
    def from_parts(
        cls,
        codes: torch.Tensor,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        format: str | Format = "nf4",
        block_size: int | None = None,
        absmax: torch.Tensor | None = None,
        scale_codes: torch.Tensor | None = None,
        scale_absmax: torch.Tensor | None = None,
        scale_offset: torch.Tensor | None = None,
        scale_codebook: torch.Tensor | None = None,
        **others: torch.Tensor | None,
    ) -> QuantizedWeight:
        """Assemble a weight from its tensors, checking sizes, dtypes and devices; nothing is
        copied.

        Which kind of scales is given decides between fp32 and double-quantized scales. `others`
        are the tensors of shifts and learned tables.

        Raises:
            ArgumentError: sizes that do not fit, both or neither kind of scales, a tensor that the
                format does not have, or lacks.
            ArgumentTypeError: a tensor of the wrong dtype.
        """
        op = "QuantizedWeight.from_parts"
        given: dict[str, torch.Tensor | None] = {
            "codes": codes,
            "absmax": absmax,
            "scale_codes": scale_codes,
            "scale_absmax": scale_absmax,
            "scale_offset": scale_offset,
            "scale_codebook": scale_codebook,
            **others,
        }
        fmt = get_format(format).override(block_size, double_quant=absmax is None)
        _check_scales(op, fmt, given)
        if dtype not in WEIGHT_DTYPES:
            raise type_error(op, "dtype", "float32, float16 or bfloat16", dtype)
        if not isinstance(codes, torch.Tensor):
            raise type_error(op, "codes", "a tensor", type(codes).__name__)
        shape = tuple(int(s) for s in shape)
        if any(s < 0 for s in shape):
            raise argument_error(op, "shape", "non-negative", shape)
        parts: dict[str, Any] = {}
        for name, tensor in given.items():
            if tensor is not None:
                parts[name] = _checked(op, fmt, shape, codes, name, tensor)
        missing = [name for name in fmt.tensor_sizes(shape) if name not in parts]
        if missing:
            raise argument_error(op, missing[0], f"given for format {fmt.name!r}", None)
        return cls(shape=shape, dtype=dtype, format=fmt, **parts)

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        format: str | Format = "nf4",
        device: torch.device | str = "meta",
    ) -> QuantizedWeight:
        """A weight whose tensors have the right sizes and no values: something to load into."""
        fmt = get_format(format)
        sizes = fmt.tensor_sizes(tuple(shape))
        tensors: dict[str, Any] = {
            name: torch.empty(size, dtype=kind, device=device)
            for name, (size, kind) in sizes.items()
        }
        return cls(shape=tuple(shape), dtype=dtype, format=fmt, **tensors)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.codes.device

    @property
    def numel(self) -> int:
        """Number of weights."""
        return _numel(self.shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by field name, absent ones left out."""
        return {
            name: tensor
            for name in TENSOR_FIELDS
            if isinstance(tensor := getattr(self, name), torch.Tensor)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits per weight, from the real bytes; NaN for an empty weight."""
        return self.nbytes * 8 / self.numel if self.numel else float("nan")

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def operands(self) -> WeightOperands | StoredOperands:
        """What the ops take; a `WeightOperands` is what kernels take as well."""
        traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        held: WeightOperands | None = self.__dict__.get("_operands")
        if held is not None and not traced:
            return held
        tensors = {name: getattr(self, name) for name in TENSOR_FIELDS}
        operands = assemble_operands(self.format, self.shape, tensors)
        # Kept where they are the stored tensors themselves and nothing is being traced: making
        # them takes longer than all else that Python does for a matmul.
        if (
            isinstance(operands, WeightOperands)
            and self.format.scale_store in ("fp32", "double_quant")
            and type(self.codes) is torch.Tensor
            and not traced
        ):
            self.__dict__["_operands"] = operands
            if len(operands.shape) == 2:
                self.__dict__["_flat"] = operands.flat()
        return operands

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_operands", "_flat")
        return {name: value for name, value in self.__dict__.items() if name not in kept}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor as integers of the same bits, as layers and checkpoints hold it: fp32 as
    int32, 16-bit floats as int16, codes as they are."""
    return tensor.view(_BITS.get(tensor.dtype, tensor.dtype))


def values_of(bits: torch.Tensor, field: str, fmt: Format) -> torch.Tensor:
    """The inverse of `bits_of` for a field of a QuantizedWeight of `fmt`."""
    if bits.dtype == torch.int32:
        return bits.view(torch.float32)
    if bits.dtype != torch.int16:
        return bits
    narrow = torch.float16 if field == "tables" else FLOAT_STORES.get(fmt.scale_store)
    return bits if narrow is None else bits.view(narrow)


def is_table_of(table: torch.Tensor | None, fmt: Format) -> bool:
    """Whether a stored table fp32 [16] is the format's, bit for bit; a format whose tables are
    learned has none of its own (None)."""
    if table is None or fmt.lut_scope != "global":
        return table is None and fmt.lut_scope != "global"
    own = fmt.codebook.table(table.device)
    return torch.equal(table.view(torch.int32), own.view(torch.int32))


def _check_scales(op: str, fmt: Format, given: dict[str, torch.Tensor | None]) -> None:
    """One kind of scales, whole: all that the format's store has."""
    wanted = [name for name in fmt.tensor_sizes((0,)) if name in _SCALES]
    found = [name for name in _SCALES if given[name] is not None]
    if found != wanted:
        rule = "either absmax or all of scale_codes, scale_absmax, scale_offset"
        if fmt.scale_store not in ("fp32", "double_quant"):
            rule = f"{', '.join(wanted)} for format {fmt.name!r}"
        raise argument_error(op, "scales", rule, found)


def _checked(
    op: str,
    fmt: Format,
    shape: tuple[int, ...],
    codes: torch.Tensor,
    name: str,
    tensor: torch.Tensor,
) -> torch.Tensor:
    sizes = fmt.tensor_sizes(shape)
    if fmt.double_quant:
        sizes["scale_codebook"] = (256, torch.float32)
    if name not in sizes:
        raise argument_error(op, name, f"None for format {fmt.name!r}", "a tensor")
    size, want = sizes[name]
    if tensor.dtype != want:
        raise type_error(op, name, want, tensor.dtype)
    if tensor.numel() != size:
        raise argument_error(op, name, f"{size} elements for shape {shape}", tensor.numel())
    if tensor.device != codes.device:
        raise argument_error(op, name, f"on {codes.device} like codes", tensor.device)
    return tensor.reshape(-1)


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
