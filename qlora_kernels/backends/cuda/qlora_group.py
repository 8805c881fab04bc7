"""qlora_group and its backward in CUDA: the kernels of qlora_linear, member by member."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_kernels.backends.cuda.common import register_cuda_kernel
from qlora_kernels.backends.cuda.matmul_path import matmul_rejects
from qlora_kernels.backends.cuda.qlora_linear import qlora_linear_backward_cuda, qlora_linear_cuda
from qlora_kernels.backends.cuda.quantized_matmul import (
    quantized_matmul_backward_input_cuda,
    quantized_matmul_cuda,
)
from qlora_kernels.reference.qlora_group import (
    GroupGradients,
    GroupMember,
    MemberKernels,
    MemberNeeds,
    backward_by_members,
    forward_by_members,
)

_KERNELS = MemberKernels(
    quantized_matmul_cuda,
    quantized_matmul_backward_input_cuda,
    qlora_linear_cuda,
    qlora_linear_backward_cuda,
)


@register_cuda_kernel("qlora_group", rejects=matmul_rejects)
def qlora_group_cuda(
    x: torch.Tensor, members: Sequence[GroupMember], batch_invariant: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every y and xa; see `reference.qlora_group_reference`."""
    return forward_by_members(_KERNELS, x, members, batch_invariant)


@register_cuda_kernel("qlora_group_backward", rejects=matmul_rejects)
def qlora_group_backward_cuda(
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x, grad_a, grad_b; see `reference.qlora_group_backward_reference`."""
    return backward_by_members(_KERNELS, grad_ys, x, xa, members, needs)
