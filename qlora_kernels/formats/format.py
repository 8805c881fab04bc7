"""Format: how a weight is stored. Data, not code: codebook × block size × scale rule × shift ×
scale store × encoder.

A stored weight is w = scale[b]·table[code] (+ shift[b]), b the block of `block_size` consecutive
weights that it is in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.dynamic8 import SCALE_BLOCK_SIZE
from qlora_kernels.formats.packing import n_blocks, packed_size
from qlora_kernels.formats.scale_store import (
    EIGHT_BIT_STORES,
    FLOAT_STORES,
    SCALE_STORES,
    UNSIGNED_STORES,
    ScaleStore,
)

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 4096

ScaleRule = Literal["absmax", "signed_absmax", "minmax", "rms", "power_of_two"]
Shift = Literal["none", "min", "mean", "median", "mse", "entropy"]
LutScope = Literal["global", "tensor", "row"]
EncoderName = Literal["nearest", "scale_search", "least_squares"]
EncodeAgainst = Literal["original", "decoded"]
Pack = Literal["nibble", "dense"]
CodebookRule = Callable[[int], Codebook]

_CHOICES: dict[str, tuple[str, ...]] = {
    "scale_rule": get_args(ScaleRule),
    "scale_store": SCALE_STORES,
    "shift": get_args(Shift),
    "lut_scope": get_args(LutScope),
    "encoder": get_args(EncoderName),
    "encode_against": get_args(EncodeAgainst),
    "pack": get_args(Pack),
}


def check_block_size(op: str, block_size: object, argument: str = "block_size") -> int:
    """Return block_size if it is a power of two in 16 … 4096, else raise ArgumentError."""
    if (
        not isinstance(block_size, int)
        or isinstance(block_size, bool)
        or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE
        or block_size & (block_size - 1)
    ):
        rule = f"a power of two in {MIN_BLOCK_SIZE} … {MAX_BLOCK_SIZE}"
        raise argument_error(op, argument, rule, repr(block_size))
    return block_size


@dataclass(frozen=True)
class Format:
    """A storage format for weights.

    Args:
        name: registry key.
        codebook: the values, or a rule that gives them for a block size. With a learned table
            (lut_scope "tensor" or "row") it is where the learner starts.
        block_size: weights per first-level scale, over the flattened row-major weight.
        scale_rule: how a block's scale is chosen. "absmax": the largest magnitude.
            "signed_absmax": the same, with the sign that takes that weight to the table's value of
            largest magnitude (a tie: the positive one). "minmax": the block's range over the
            table's (needs shift "min"). "rms": the root of the mean square. "power_of_two":
            2^(floor(log2 absmax) - floor(log2 of the table's largest magnitude)), as OCP MX does.
        scale_store: what scales and shifts are written as; see `scale_store.py`.
        scale_block_size: first-level scales per second-level scale.
        encode_against: "original" takes codes against the scale as chosen (compatible with
            bitsandbytes), "decoded" against the scale that dequantize will see.
        shift: what is subtracted from a block before its scale is chosen. "min": so that the least
            weight falls on the table's least value, by "minmax" alone. "mean", "median" of the
            block. "mse", "entropy": the median plus the multiple of absmax that errs least, or
            under which the codes have the most entropy (ICQ of IR-QLoRA, 2024).
        lut_scope: "global": the codebook. "tensor", "row": a table learned for each weight, or for
            each of its rows, stored in fp16.
        encoder: "nearest" takes the scale as the rule says. "scale_search" tries multiples of it,
            "least_squares" refits it to the codes in turns; both keep the one of least squared
            error. Codes are the nearest to the scale in every case.
        pins: values that a learned table must hold.
        pack: "nibble": 4 bits a code. "dense": 2 or 3 bits a code, for tables of at most 4 or 8.
        codebook_rule: the rule, when `codebook` was one; set by the constructor.

    Raises:
        ArgumentError: a field outside its range, or fields that exclude each other.
    """

    name: str = ""
    codebook: Codebook = None  # type: ignore[assignment]  # a name is optional, a codebook is not
    block_size: int = 64
    scale_rule: ScaleRule = "absmax"
    scale_store: ScaleStore = "double_quant"
    scale_block_size: int = SCALE_BLOCK_SIZE
    encode_against: EncodeAgainst = "decoded"
    shift: Shift = "none"
    lut_scope: LutScope = "global"
    encoder: EncoderName = "nearest"
    pins: tuple[float, ...] = ()
    pack: Pack = "nibble"
    codebook_rule: CodebookRule | None = None

    def __post_init__(self) -> None:
        check_block_size("Format", self.block_size)
        check_block_size("Format", self.scale_block_size, "scale_block_size")
        if not isinstance(self.codebook, Codebook) and callable(self.codebook):
            object.__setattr__(self, "codebook_rule", self.codebook)
        if self.codebook_rule is not None:
            object.__setattr__(self, "codebook", self.codebook_rule(self.block_size))
        if not isinstance(self.codebook, Codebook):
            got = type(self.codebook).__name__
            raise type_error("Format", "codebook", "a Codebook, or a rule that gives one", got)
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                named = ", ".join(f'"{choice}"' for choice in choices)
                raise argument_error("Format", field, f"one of {named}", repr(value))
        object.__setattr__(self, "pins", tuple(float(pin) for pin in self.pins))
        self._check_combination()

    def _check_combination(self) -> None:
        if (self.scale_rule == "minmax") != (self.shift == "min"):
            raise argument_error(
                "Format", "shift", '"min" with scale_rule "minmax" and only then', repr(self.shift)
            )
        signed = self.scale_rule == "signed_absmax" or self.shift != "none"
        if signed and self.scale_store in UNSIGNED_STORES:
            raise argument_error(
                "Format", "scale_store", "one with a sign for signed scales or shifts", "e8m0"
            )
        if self.encode_against == "original" and not self.compatible_encoding:
            raise argument_error(
                "Format",
                "encode_against",
                '"decoded" unless the scales are absmax, unsearched and without a shift',
                '"original"',
            )
        if self.pack == "dense" and len(self.codebook.values) > 8:
            raise argument_error(
                "Format", "codebook", "at most 8 values to be packed densely", self.codebook.values
            )
        if self.pins and self.lut_scope == "global":
            raise argument_error("Format", "pins", "empty unless a table is learned", self.pins)
        if len(self.pins) >= len(self.codebook.values) and self.pins:
            raise argument_error("Format", "pins", "fewer than the table's values", self.pins)

    @property
    def compatible_encoding(self) -> bool:
        """Whether the quantize op chooses the scales itself: absmax over a fixed table."""
        return (
            self.scale_rule == "absmax"
            and self.shift == "none"
            and self.encoder == "nearest"
            and self.lut_scope == "global"
        )

    @property
    def double_quant(self) -> bool:
        """Whether first-level scales are themselves quantized as bitsandbytes does it."""
        return self.scale_store == "double_quant"

    @property
    def plain(self) -> bool:
        """Whether kernels take the stored tensors as they are: no shift, one table, 4-bit codes,
        scales in fp32 or 8 bits. Others are converted or composed when they are used."""
        return (
            self.shift == "none"
            and self.lut_scope == "global"
            and self.pack == "nibble"
            and self.scale_store not in ("fp16", "bf16")
        )

    @property
    def code_bits(self) -> int:
        """Bits a code takes in storage: 4, or 2 or 3 when packed densely."""
        if self.pack == "nibble":
            return 4
        return max(2, (len(self.codebook.values) - 1).bit_length())

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Where a normalised weight passes from one value to the next, ascending: fp32 midpoints
        for "original" encoding, exact ones for "decoded"."""
        original = self.encode_against == "original"
        return (self.codebook.encoder if original else self.codebook.exact_encoder).boundaries

    @property
    def has_zero(self) -> bool:
        """Whether the table holds an exact 0."""
        return 0.0 in self.codebook.values

    def tensor_sizes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, torch.dtype]]:
        """Elements and dtype of every stored tensor of a weight of `shape`, by the name of the
        field of QuantizedWeight."""
        numel = math.prod(shape)
        blocks = n_blocks(numel, self.block_size)
        sizes = {"codes": (packed_size(numel, self.code_bits), torch.uint8)}
        sizes |= self._scale_sizes(blocks, "absmax", "scale")
        if self.shift != "none":
            sizes |= self._scale_sizes(blocks, "shift", "shift")
        if self.lut_scope != "global":
            rows = shape[0] if self.lut_scope == "row" and len(shape) > 1 else 1
            sizes["tables"] = (rows * len(self.codebook.values), torch.float16)
        return sizes

    def _scale_sizes(
        self, blocks: int, whole: str, prefix: str
    ) -> dict[str, tuple[int, torch.dtype]]:
        if self.scale_store in FLOAT_STORES:
            return {whole: (blocks, FLOAT_STORES[self.scale_store])}
        store = EIGHT_BIT_STORES[self.scale_store]
        sizes = {f"{prefix}_codes": (blocks, torch.uint8)}
        if store.second_level != "none":
            per_block = n_blocks(blocks, self.scale_block_size)
            count = per_block if store.second_level == "block" else 1
            sizes[f"{prefix}_absmax"] = (count, torch.float32)
        if store.offset != "none":
            sizes[f"{prefix}_offset"] = (1, torch.float32)
        return sizes

    def bits_per_param(self, shape: tuple[int, ...]) -> float:
        """Stored bits per weight of a weight of `shape`, from the bytes it will have; NaN for an
        empty one."""
        numel = math.prod(shape)
        stored = sum(n * dtype.itemsize for n, dtype in self.tensor_sizes(shape).values())
        return stored * 8 / numel if numel else math.nan

    def override(self, block_size: int | None = None, double_quant: bool | None = None) -> Format:
        """This format with another block size or scale store; None keeps the format's own.

        double_quant chooses between fp32 and double-quantized scales; a format with any other store
        keeps it.
        """
        changes: dict[str, Any] = {}
        if block_size is not None:
            changes["block_size"] = block_size
        if double_quant is not None and self.scale_store in ("fp32", "double_quant"):
            changes["scale_store"] = "double_quant" if double_quant else "fp32"
        same = all(getattr(self, field) == value for field, value in changes.items())
        return self if same else dataclasses.replace(self, **changes)

    def with_codebook(self, codebook: Codebook) -> Format:
        """This format with another table for every block size."""
        return dataclasses.replace(self, codebook=codebook, codebook_rule=None)
