"""L0: what a quantized weight is. One variant a file; importing this package registers the
built-in ones."""

from qlora_kernels.formats import fp4, int4, nf4
from qlora_kernels.formats.codebook import Codebook, Encoder
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight, WeightOperands
from qlora_kernels.formats.registry import get_format, list_formats, register_format

__all__ = [
    "Codebook",
    "Encoder",
    "Format",
    "QuantizedWeight",
    "WeightOperands",
    "fp4",
    "get_format",
    "int4",
    "list_formats",
    "nf4",
    "register_format",
]
