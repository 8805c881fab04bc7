"""L3: the torch ops: schema, fake, checks, and a body that picks a kernel."""

from qlora_kernels.ops.codecs import dequantize, double_quantize, explain, quantize

__all__ = ["dequantize", "double_quantize", "explain", "quantize"]
