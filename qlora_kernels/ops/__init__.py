"""L3: the torch ops: schema, fake, checks, and a body that picks a kernel."""

from qlora_kernels.ops import (
    dropout,
    experts,
    qlora_group,
    qlora_linear,
    quantized_matmul,
    stored,
)
from qlora_kernels.ops.codecs import dequantize, double_quantize, quantize
from qlora_kernels.ops.dequantize_many import dequantize_many
from qlora_kernels.ops.explain import explain

__all__ = [
    "dequantize",
    "dequantize_many",
    "double_quantize",
    "dropout",
    "experts",
    "explain",
    "qlora_group",
    "qlora_linear",
    "quantize",
    "quantized_matmul",
    "stored",
]
