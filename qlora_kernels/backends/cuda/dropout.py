"""dropout in CUDA: csrc/kernels/dropout.cu, for ops.dropout and inside qlora_linear."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cuda.common import contiguous, current_stream, register_cuda_kernel


@register_cuda_kernel("dropout")
def dropout_cuda(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """`reference.dropout_reference`; x itself where nothing is dropped. The seed stays on the
    device."""
    if dropout_p == 0.0 or seed is None:
        return x
    x = contiguous(x.detach())
    dropped = torch.empty_like(x)
    torch.ops.qlora_kernels_cuda.dropout.default(x, dropout_p, seed, dropped, current_stream(x))
    return dropped
