"""qlora_group and its backward on the CPU: the kernels of qlora_linear, member by member.

For many tokens what the adapters do with x is one product of their stacked A: xa in the forward,
every grad_a in the backward. Where x is dropped each member has another x of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qlora_kernels.backends.cpu.common import contiguous, register_cpu_kernel
from qlora_kernels.backends.cpu.explained import matmul_path
from qlora_kernels.backends.cpu.panels import (
    adapter_gradient,
    down_projection,
    gemm_dtype,
    up_gradient,
)
from qlora_kernels.backends.cpu.qlora_linear import (
    qlora_linear_backward_cpu,
    qlora_linear_cpu,
    qlora_path,
)
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
    empty_gradients,
    forward_by_members,
    rank_ranges,
)


@functools.cache
def _kernels(isa: int) -> MemberKernels:
    return MemberKernels(
        functools.partial(quantized_matmul_cpu, isa),
        functools.partial(quantized_matmul_backward_input_cpu, isa),
        functools.partial(qlora_linear_cpu, isa),
        functools.partial(qlora_linear_backward_cpu, isa),
    )


def _product_dtype(
    isa: int, x: torch.Tensor, member: GroupMember, depth: int, batch_invariant: bool = False
) -> torch.dtype | None:
    """What a product of an adapter over `depth` is computed in where it is torch's GEMM, else
    None."""
    path = qlora_path(isa, x, member.weight, batch_invariant)
    return gemm_dtype(x.dtype, isa, depth) if path == "panels" else None


@register_cpu_kernel("qlora_group", path=matmul_path)
def qlora_group_cpu(
    isa: int, x: torch.Tensor, members: Sequence[GroupMember], batch_invariant: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every y and xa; see `reference.qlora_group_reference`."""
    adapters = [m.lora_a for m in members if m.lora_a is not None]
    dtypes = {_product_dtype(isa, x, m, x.shape[1], batch_invariant) for m in members}
    dtype = dtypes.pop()
    if dtypes or dtype is None or len(adapters) < 2 or any(m.dropout_p for m in members):
        return forward_by_members(_kernels(isa), x, members, batch_invariant)
    x = contiguous(x)
    stacked = torch.cat([a.detach().to(x.dtype) for a in adapters])
    xa = down_projection(x, stacked, dtype)
    ys = []
    for m, (begin, end) in zip(members, rank_ranges(members), strict=True):
        if m.lora_a is None:
            ys.append(quantized_matmul_cpu(isa, x, m.weight, m.bias))
            continue
        assert m.lora_b is not None
        part = contiguous(xa[:, begin:end])
        y, _ = qlora_linear_cpu(isa, x, m.weight, m.lora_a, m.lora_b, m.scaling, m.bias, xa=part)
        ys.append(y)
    return ys, xa


@register_cpu_kernel("qlora_group_backward", path=matmul_path)
def qlora_group_backward_cpu(
    isa: int,
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x, grad_a, grad_b; see `reference.qlora_group_backward_reference`."""
    adapted = [
        i
        for i, (m, grad_y) in enumerate(zip(members, grad_ys, strict=True))
        if m.lora_a is not None and grad_y is not None and needs.lora_a[i]
    ]
    dtypes = [_product_dtype(isa, x, members[i], members[i].weight.shape[0]) for i in adapted]
    if len(adapted) < 2 or None in dtypes or any(m.dropout_p for m in members):
        return backward_by_members(_kernels(isa), grad_ys, x, xa, members, needs)
    us: dict[int, torch.Tensor] = {}
    for i, dtype in zip(adapted, dtypes, strict=True):
        m, grad_y = members[i], grad_ys[i]
        assert m.lora_b is not None and grad_y is not None and dtype is not None
        us[i] = up_gradient(grad_y, m.lora_b, m.scaling, dtype)
    grads_a, grads_b = empty_gradients(x, members, needs)
    gradients = _stacked_gradients(us, x, members)
    grad_x: torch.Tensor | None = None
    for i, (begin, end) in reversed(list(enumerate(rank_ranges(members)))):
        m, grad_y = members[i], grad_ys[i]
        if grad_y is None:
            continue
        part = None
        if m.lora_a is None:
            if needs.x:
                part = quantized_matmul_backward_input_cpu(isa, grad_y, m.weight)
        elif needs.x or needs.lora_b[i]:
            part, _, grad_b = qlora_linear_backward_cpu(
                *(isa, grad_y, x, xa[:, begin:end], m.weight, m.lora_a, m.lora_b, m.scaling),
                needs=(needs.x, False, needs.lora_b[i]),
                u=us.get(i),
            )
            grads_b[i] = grad_b if needs.lora_b[i] else grads_b[i]
        grads_a[i] = gradients.get(i, grads_a[i])
        if part is not None and needs.x:
            grad_x = part if grad_x is None else grad_x.add_(part)
    if grad_x is None:
        grad_x = torch.zeros_like(x) if needs.x else x.new_empty(0)
    return grad_x, grads_a, grads_b


def _stacked_gradients(
    us: dict[int, torch.Tensor], x: torch.Tensor, members: Sequence[GroupMember]
) -> dict[int, torch.Tensor]:
    """grad_a = uᵀ x [R,K] by member: one product of all u, summed in fp32."""
    gradient = adapter_gradient(torch.cat(list(us.values()), dim=1), x, torch.float32)
    parts = gradient.split([u.shape[1] for u in us.values()])
    found = {}
    for (i, _), part in zip(us.items(), parts, strict=True):
        lora_a = members[i].lora_a
        assert lora_a is not None
        # A copy where fp32 is the adapter's dtype too: gradients are kept, and changed in place.
        found[i] = part.clone() if lora_a.dtype == torch.float32 else part.to(lora_a.dtype)
    return found
