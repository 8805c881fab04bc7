"""qlora_group and its backward on the CPU: the kernels of qlora_linear, member by member."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qlora_kernels.backends.cpu.common import register_cpu_kernel
from qlora_kernels.backends.cpu.qlora_linear import qlora_linear_backward_cpu, qlora_linear_cpu
from qlora_kernels.backends.cpu.quantized_matmul import (
    quantized_matmul_backward_input_cpu,
    quantized_matmul_cpu,
)
from qlora_kernels.reference.qlora_group import (
    GroupGradients,
    GroupMember,
    MemberKernels,
    MemberNeeds,
    backward_by_members,
    forward_by_members,
)


@functools.cache
def _kernels(isa: int) -> MemberKernels:
    return MemberKernels(
        functools.partial(quantized_matmul_cpu, isa),
        functools.partial(quantized_matmul_backward_input_cpu, isa),
        functools.partial(qlora_linear_cpu, isa),
        functools.partial(qlora_linear_backward_cpu, isa),
    )


@register_cpu_kernel("qlora_group")
def qlora_group_cpu(
    isa: int, x: torch.Tensor, members: Sequence[GroupMember], batch_invariant: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every y and xa; see `reference.qlora_group_reference`."""
    return forward_by_members(_kernels(isa), x, members, batch_invariant)


@register_cpu_kernel("qlora_group_backward")
def qlora_group_backward_cpu(
    isa: int,
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x, grad_a, grad_b; see `reference.qlora_group_backward_reference`."""
    return backward_by_members(_kernels(isa), grad_ys, x, xa, members, needs)
