"""L4: gradients. One autograd Function a file, with the differentiable function it is for."""

from qlora_kernels.autograd.lora_linear import lora_linear
from qlora_kernels.autograd.qlora_linear import qlora_linear
from qlora_kernels.autograd.quantized_matmul import quantized_linear

__all__ = ["lora_linear", "qlora_linear", "quantized_linear"]
