"""QLoRA kernels: 4-bit quantize, dequantize and double quantization, as torch ops."""

from qlora_kernels.backends import backend
from qlora_kernels.formats import (
    Codebook,
    Format,
    QuantizedWeight,
    get_format,
    list_formats,
    register_format,
)
from qlora_kernels.ops import dequantize, double_quantize, explain, quantize

__all__ = [
    "Codebook",
    "Format",
    "QuantizedWeight",
    "backend",
    "dequantize",
    "double_quantize",
    "explain",
    "get_format",
    "list_formats",
    "quantize",
    "register_format",
]
