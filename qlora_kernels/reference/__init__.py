"""L1: the written specification of every op. Plain torch, slow, fp64-capable; rounding order
stated in each file."""

from qlora_kernels.reference.dequantize import (
    decode_scales_reference,
    dequantize_many_reference,
    dequantize_reference,
)
from qlora_kernels.reference.double_quantize import double_quantize_reference
from qlora_kernels.reference.dropout import dropout_reference, philox_words
from qlora_kernels.reference.qlora_group import (
    qlora_group_backward_reference,
    qlora_group_reference,
)
from qlora_kernels.reference.qlora_linear import (
    qlora_linear_backward_reference,
    qlora_linear_reference,
)
from qlora_kernels.reference.quantize import quantize_reference
from qlora_kernels.reference.quantized_matmul import (
    quantized_matmul_backward_input_reference,
    quantized_matmul_reference,
)
from qlora_kernels.reference.stored import (
    decode_shifts_reference,
    decode_stored_scales_reference,
    dequantize_stored_reference,
)

__all__ = [
    "decode_scales_reference",
    "decode_shifts_reference",
    "decode_stored_scales_reference",
    "dequantize_many_reference",
    "dequantize_reference",
    "dequantize_stored_reference",
    "double_quantize_reference",
    "dropout_reference",
    "philox_words",
    "qlora_group_backward_reference",
    "qlora_group_reference",
    "qlora_linear_backward_reference",
    "qlora_linear_reference",
    "quantize_reference",
    "quantized_matmul_backward_input_reference",
    "quantized_matmul_reference",
]
