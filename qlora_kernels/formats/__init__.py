"""L0: what a quantized weight is. One variant a file; importing this package registers the
built-in ones."""

from qlora_kernels.formats import (
    af4,
    bof,
    e2m1,
    e3m0,
    fp4,
    int4,
    int4_asym,
    int4_full,
    learned,
    mxfp4,
    nf4,
    nfk,
    nvfp4,
    sf4,
)
from qlora_kernels.formats.codebook import Codebook, Encoder
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.operands import StoredOperands, WeightOperands
from qlora_kernels.formats.quantile_book import quantile_book
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.formats.registry import get_format, list_formats, register, register_format

__all__ = [
    "Codebook",
    "Encoder",
    "Format",
    "QuantizedWeight",
    "StoredOperands",
    "WeightOperands",
    "af4",
    "bof",
    "e2m1",
    "e3m0",
    "fp4",
    "get_format",
    "int4",
    "int4_asym",
    "int4_full",
    "learned",
    "list_formats",
    "mxfp4",
    "nf4",
    "nfk",
    "nvfp4",
    "quantile_book",
    "register",
    "register_format",
    "sf4",
]
