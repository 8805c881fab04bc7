"""Scale stores: what the first-level scales (and shifts) of a weight are written as.

fp32, fp16, bf16: as they are, in that dtype. The 8-bit stores are a table of 256 values by code,
times a second-level scale, plus an offset: scale = fl(fl(table[code]·scale_absmax) + offset).

- double_quant: dynamic8, one fp32 scale per `scale_block_size`, the mean as offset (QLoRA, §3);
- int8_mean: two's complement code / 128, likewise with the mean as offset (torchao's NF4Tensor);
- uint8_min: code / 255, likewise with the smallest scale as offset (LQ-LoRA, §3.2);
- sign7: a sign bit and 7 bits, ±code / 127, one fp32 scale per `scale_block_size`, no offset: for
  signed scales, whose mean says nothing (BOF4-S);
- e4m3: float8_e4m3fn, one fp32 scale for the whole weight, largest / 448 (NVFP4);
- e8m0: 2^(code - 127), nothing else (OCP MX); code 255 is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qlora_kernels.formats.codebook import constant_tensor
from qlora_kernels.formats.dynamic8 import dynamic8_table

ScaleStore = Literal[
    "fp32", "fp16", "bf16", "e4m3", "e8m0", "double_quant", "int8_mean", "uint8_min", "sign7"
]
SCALE_STORES: tuple[str, ...] = get_args(ScaleStore)
FLOAT_STORES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EightBitStore:
    """How an 8-bit store is laid out.

    second_level: how many fp32 second-level scales there are: one per `scale_block_size` scales
        ("block"), one per weight ("tensor"), or none, which stands for 1.
    offset: what is subtracted before scaling: "mean", "min", or nothing.
    peak: the table's largest value, what the largest scale of a second-level block is mapped to.
    """

    second_level: Literal["block", "tensor", "none"]
    offset: Literal["mean", "min", "none"]
    peak: float = 1.0


EIGHT_BIT_STORES: dict[str, EightBitStore] = {
    "double_quant": EightBitStore("block", "mean"),
    "int8_mean": EightBitStore("block", "mean"),
    "uint8_min": EightBitStore("block", "min"),
    "sign7": EightBitStore("block", "none"),
    "e4m3": EightBitStore("tensor", "none", peak=448.0),
    "e8m0": EightBitStore("none", "none"),
}
# A negative scale would be stored as something else.
UNSIGNED_STORES = ("e8m0",)


def _e4m3(code: int) -> float:
    """float8_e4m3fn: bias 7, no infinities, 0x7f and 0xff are NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    sign = -1.0 if code >> 7 else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def _table_values(store: str) -> tuple[float, ...]:
    if store == "int8_mean":
        return tuple((code - 256 if code > 127 else code) / 128 for code in range(256))
    if store == "uint8_min":
        return tuple(code / 255 for code in range(256))
    if store == "sign7":
        return tuple((-1 if code > 127 else 1) * (code & 127) / 127 for code in range(256))
    if store == "e4m3":
        return tuple(_e4m3(code) for code in range(256))
    assert store == "e8m0", store
    return (*tuple(2.0 ** (code - 127) for code in range(255)), math.nan)


# The 256 values of each 8-bit store other than double_quant, by code.
TABLE_VALUES = {
    store: _table_values(store) for store in ("int8_mean", "uint8_min", "sign7", "e4m3", "e8m0")
}


def scale_table(store: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The table of an 8-bit store as a shared fp32 tensor [256] on `device`; not to be written."""
    if store == "double_quant":
        return dynamic8_table(device)
    return constant_tensor(store, TABLE_VALUES[store], torch.float32, torch.device(device))
