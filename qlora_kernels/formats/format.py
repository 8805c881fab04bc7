"""Format: how a weight is stored. Data, not code: codebook × block size × scale rule × scale store
× encoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.dynamic8 import SCALE_BLOCK_SIZE

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 32, 4096

ScaleRule = Literal["absmax"]
ScaleStore = Literal["fp32", "double_quant"]
EncodeAgainst = Literal["original", "decoded"]


def check_block_size(op: str, block_size: object, argument: str = "block_size") -> int:
    """Return block_size if it is a power of two in 32 … 4096, else raise ArgumentError."""
    if (
        not isinstance(block_size, int)
        or isinstance(block_size, bool)
        or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE
        or block_size & (block_size - 1)
    ):
        raise argument_error(op, argument, "a power of two in 32 … 4096", repr(block_size))
    return block_size


@dataclass(frozen=True)
class Format:
    """A storage format for weights.

    Args:
        name: registry key.
        codebook: the values.
        block_size: weights per first-level scale, over the flattened row-major weight.
        scale_rule: how a block's scale is chosen; "absmax" is the largest magnitude.
        scale_store: "fp32", or "double_quant" (8-bit dynamic8 codes over blocks of
            `scale_block_size` scales).
        scale_block_size: first-level scales per second-level scale.
        encode_against: "original" takes codes against the exact absmax (compatible with
            bitsandbytes), "decoded" against the scale that dequantize will see.

    Raises:
        ArgumentError: a field outside its range.
    """

    name: str
    codebook: Codebook
    block_size: int = 64
    scale_rule: ScaleRule = "absmax"
    scale_store: ScaleStore = "double_quant"
    scale_block_size: int = SCALE_BLOCK_SIZE
    encode_against: EncodeAgainst = "original"

    def __post_init__(self) -> None:
        if not isinstance(self.codebook, Codebook):
            raise type_error("Format", "codebook", "a Codebook", type(self.codebook).__name__)
        check_block_size("Format", self.block_size)
        check_block_size("Format", self.scale_block_size, "scale_block_size")
        if self.scale_rule != "absmax":
            raise argument_error("Format", "scale_rule", '"absmax"', repr(self.scale_rule))
        if self.scale_store not in ("fp32", "double_quant"):
            raise argument_error(
                "Format", "scale_store", '"fp32" or "double_quant"', repr(self.scale_store)
            )
        if self.encode_against not in ("original", "decoded"):
            raise argument_error(
                "Format", "encode_against", '"original" or "decoded"', repr(self.encode_against)
            )

    @property
    def double_quant(self) -> bool:
        """Whether first-level scales are themselves quantized."""
        return self.scale_store == "double_quant"

    def override(self, block_size: int | None = None, double_quant: bool | None = None) -> Format:
        """This format with another block size or scale store; None keeps the format's own."""
        changes: dict[str, object] = {}
        if block_size is not None and block_size != self.block_size:
            changes["block_size"] = block_size
        if double_quant is not None and double_quant != self.double_quant:
            changes["scale_store"] = "double_quant" if double_quant else "fp32"
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[arg-type]
