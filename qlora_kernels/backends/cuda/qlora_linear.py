"""qlora_linear and its backward in CUDA: the fused kernel for few tokens, else Ŵ in scratch and
cuBLAS (dense_path.py)."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cuda.common import contiguous, register_cuda_kernel
from qlora_kernels.backends.cuda.dense_path import dense_backward, dense_forward
from qlora_kernels.backends.cuda.dropout import dropout_cuda
from qlora_kernels.backends.cuda.explained import backward_path, forward_path
from qlora_kernels.backends.cuda.low_rank import plan_projection
from qlora_kernels.backends.cuda.matmul_path import choose_path, matmul_rejects
from qlora_kernels.backends.cuda.quantized_matmul import fused_matmul, sizes_of
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference.qlora_group import GroupMember, MemberNeeds


@register_cuda_kernel("qlora_linear", rejects=matmul_rejects, path=forward_path)
def qlora_linear_cuda(
    x: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M,N] and xa [M,R]; see `reference.qlora_linear_reference`."""
    x = contiguous(x.detach())
    path = choose_path(sizes_of(x, operands, batch_invariant))
    if path != "dense":
        first = plan_projection(dropout_cuda(x, dropout_p, seed), lora_a)
        y = fused_matmul(x, operands, bias, first.result, lora_b, scaling, first, path)
        return y, first.result
    member = GroupMember(operands, lora_a, lora_b, scaling, bias, dropout_p, seed)
    (y,), xa = dense_forward(x, [member])
    return y, xa


@register_cuda_kernel("qlora_linear_backward", rejects=matmul_rejects, path=backward_path)
def qlora_linear_backward_cuda(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    xa: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x, grad_a, grad_b, empty where not needed; see `qlora_linear_backward_reference`."""
    member = GroupMember(operands, lora_a, lora_b, scaling, None, dropout_p, seed)
    wanted = MemberNeeds(needs[0], needs[1:2], needs[2:])
    grad_x, (grad_a,), (grad_b,) = dense_backward([grad_y], x, xa, [member], wanted)
    return grad_x, grad_a, grad_b
