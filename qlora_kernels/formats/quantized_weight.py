"""QuantizedWeight: packed codes, scales, format, logical shape and dtype. A plain frozen dataclass
of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.packing import n_blocks, packed_size
from qlora_kernels.formats.registry import get_format

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TENSOR_FIELDS = (
    "codes",
    "absmax",
    "scale_codes",
    "scale_absmax",
    "scale_offset",
    "scale_codebook",
)


class WeightOperands(NamedTuple):
    """A 2-D quantized weight as kernels take it: tensors and plain numbers, no names.

    codes u8 [ceil(N·K/2)]; either absmax fp32 [n_blocks], or scale_codes u8 [n_blocks],
    scale_absmax fp32 [ceil(n_blocks/scale_block_size)], scale_offset fp32 [1] and scale_codebook
    fp32 [256]; codebook fp32 [16], by code, unused entries NaN; shape (N, K).
    """

    codes: torch.Tensor
    absmax: torch.Tensor | None
    scale_codes: torch.Tensor | None
    scale_absmax: torch.Tensor | None
    scale_offset: torch.Tensor | None
    codebook: torch.Tensor
    scale_codebook: torch.Tensor | None
    shape: tuple[int, ...]
    block_size: int
    scale_block_size: int


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight in 4-bit storage; `formats.md`'s canonical (bitsandbytes) layout.

    Attributes:
        codes: u8 [ceil(numel/2)], element 2i in the high nibble.
        shape, dtype: of the weight it stands for; dtype is what dequantize returns by default.
        format: the Format with the block size and scale store actually used.
        absmax: fp32 [n_blocks], or None when double-quantized.
        scale_codes, scale_absmax, scale_offset: u8 [n_blocks], fp32 [ceil(n_blocks/256)], fp32
            [1]; None otherwise.
        scale_codebook: fp32 [256] when it is not dynamic8 (a checkpoint that brings its own), else
            None.
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
    ) -> QuantizedWeight:
        """Assemble a weight from its tensors, checking sizes, dtypes and devices; nothing is
        copied.

        Raises:
            ArgumentError: sizes that do not fit, both or neither kind of scales.
            ArgumentTypeError: a tensor of the wrong dtype.
        """
        op = "QuantizedWeight.from_parts"
        nested = (scale_codes, scale_absmax, scale_offset)
        if (absmax is None) == all(part is None for part in nested) or (
            absmax is None and any(part is None for part in nested)
        ):
            raise argument_error(
                op,
                "scales",
                "either absmax or all of scale_codes, scale_absmax, scale_offset",
                [
                    n
                    for n, p in zip(_TENSOR_FIELDS[1:5], (absmax, *nested), strict=True)
                    if p is not None
                ],
            )
        if dtype not in WEIGHT_DTYPES:
            raise type_error(op, "dtype", "float32, float16 or bfloat16", dtype)
        if not isinstance(codes, torch.Tensor):
            raise type_error(op, "codes", "a tensor", type(codes).__name__)
        shape = tuple(int(s) for s in shape)
        if any(s < 0 for s in shape):
            raise argument_error(op, "shape", "non-negative", shape)
        fmt = get_format(format).override(block_size, double_quant=absmax is None)
        numel = _numel(shape)
        blocks = n_blocks(numel, fmt.block_size)
        expected: dict[str, tuple[torch.Tensor | None, torch.dtype, int]] = {
            "codes": (codes, torch.uint8, packed_size(numel)),
            "absmax": (absmax, torch.float32, blocks),
            "scale_codes": (scale_codes, torch.uint8, blocks),
            "scale_absmax": (scale_absmax, torch.float32, n_blocks(blocks, fmt.scale_block_size)),
            "scale_offset": (scale_offset, torch.float32, 1),
            "scale_codebook": (scale_codebook, torch.float32, 256),
        }
        parts: dict[str, torch.Tensor | None] = {}
        for name, (tensor, want, size) in expected.items():
            if tensor is None:
                parts[name] = None
                continue
            if tensor.dtype != want:
                raise type_error(op, name, want, tensor.dtype)
            if tensor.numel() != size:
                raise argument_error(op, name, f"{size} elements for shape {shape}", tensor.numel())
            if tensor.device != codes.device:
                raise argument_error(op, name, f"on {codes.device} like codes", tensor.device)
            parts[name] = tensor.reshape(-1)
        return cls(shape=shape, dtype=dtype, format=fmt, **parts)  # type: ignore[arg-type]

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        format: str | Format = "nf4",
        device: torch.device | str = "meta",
    ) -> QuantizedWeight:
        """A weight whose tensors have the right sizes and no values: something to load into."""
        fmt, numel = get_format(format), _numel(tuple(shape))
        blocks = n_blocks(numel, fmt.block_size)
        sizes: dict[str, tuple[int, torch.dtype]] = {"absmax": (blocks, torch.float32)}
        if fmt.double_quant:
            sizes = {
                "scale_codes": (blocks, torch.uint8),
                "scale_absmax": (n_blocks(blocks, fmt.scale_block_size), torch.float32),
                "scale_offset": (1, torch.float32),
            }
        sizes["codes"] = (packed_size(numel), torch.uint8)
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
            for name in _TENSOR_FIELDS
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

    def operands(self) -> WeightOperands:
        """What kernels take."""
        fmt = self.format
        scale_codebook = self.scale_codebook
        if self.absmax is None and scale_codebook is None:
            scale_codebook = dynamic8_table(self.device)
        return WeightOperands(
            self.codes,
            self.absmax,
            self.scale_codes,
            self.scale_absmax,
            self.scale_offset,
            fmt.codebook.table(self.device),
            scale_codebook,
            self.shape,
            fmt.block_size,
            fmt.scale_block_size,
        )


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
