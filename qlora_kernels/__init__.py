"""QLoRA kernels: 4-bit quantization and matmuls fused with LoRA, as torch ops and modules."""

from qlora_kernels.autograd import qlora_linear, quantized_linear
from qlora_kernels.backends import backend
from qlora_kernels.formats import (
    Codebook,
    Format,
    QuantizedWeight,
    get_format,
    list_formats,
    register_format,
)
from qlora_kernels.nn import (
    LoRALinear,
    QLoRALinear,
    QuantizedLinear,
    load_adapter,
    lora_parameters,
    replace_linear,
    save_adapter,
)
from qlora_kernels.ops import dequantize, double_quantize, explain, quantize

__all__ = [
    "Codebook",
    "Format",
    "LoRALinear",
    "QLoRALinear",
    "QuantizedLinear",
    "QuantizedWeight",
    "backend",
    "dequantize",
    "double_quantize",
    "explain",
    "get_format",
    "list_formats",
    "load_adapter",
    "lora_parameters",
    "qlora_linear",
    "quantize",
    "quantized_linear",
    "register_format",
    "replace_linear",
    "save_adapter",
]
