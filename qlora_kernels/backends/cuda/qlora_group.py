"""qlora_group and its backward in CUDA: one pass over x for all adapters, each way, and all weights
decoded by one launch where tokens are many (dense_path.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_kernels.backends.cuda.common import contiguous, register_cuda_kernel
from qlora_kernels.backends.cuda.dense_path import (
    dense_backward,
    dense_forward,
    drops,
    stacked,
)
from qlora_kernels.backends.cuda.dropout import dropout_cuda
from qlora_kernels.backends.cuda.explained import backward_path, forward_path
from qlora_kernels.backends.cuda.low_rank import plan_projection
from qlora_kernels.backends.cuda.matmul_path import Path, choose_path, matmul_rejects
from qlora_kernels.backends.cuda.qlora_linear import qlora_linear_backward_cuda, qlora_linear_cuda
from qlora_kernels.backends.cuda.quantized_matmul import (
    fused_matmul,
    quantized_matmul_backward_input_cuda,
    quantized_matmul_cuda,
    sizes_of,
)
from qlora_kernels.reference.qlora_group import (
    GroupGradients,
    GroupMember,
    MemberKernels,
    MemberNeeds,
    forward_by_members,
)

_KERNELS = MemberKernels(
    quantized_matmul_cuda,
    quantized_matmul_backward_input_cuda,
    qlora_linear_cuda,
    qlora_linear_backward_cuda,
)


@register_cuda_kernel("qlora_group", rejects=matmul_rejects, path=forward_path)
def qlora_group_cuda(
    x: torch.Tensor, members: Sequence[GroupMember], batch_invariant: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every y and xa; see `reference.qlora_group_reference`.

    For many tokens the scratch holds the Ŵ of all members at once.
    """
    paths = {choose_path(sizes_of(x, m.weight, batch_invariant)) for m in members}
    if paths == {"dense"}:
        return dense_forward(x, members)
    if len(paths) == 1:
        return _fused_forward(contiguous(x.detach()), members, paths.pop())
    # One of them is too large for the kernel that the others take.
    return forward_by_members(_KERNELS, x, members, batch_invariant)


@register_cuda_kernel("qlora_group_backward", rejects=matmul_rejects, path=backward_path)
def qlora_group_backward_cuda(
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x, grad_a, grad_b; see `reference.qlora_group_backward_reference`."""
    return dense_backward(grad_ys, x, xa, members, needs)


def _fused_forward(
    x: torch.Tensor, members: Sequence[GroupMember], path: Path
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One launch for the xa of all adapters whose input is x, then one for each y."""
    sharing = [m for m in members if m.lora_a is not None and m.rank and not drops(m)]
    adapters = [m.lora_a for m in sharing if m.lora_a is not None]
    own = iter(())
    products, shared = x.new_empty(len(x), 0), None
    if sharing:
        shared = plan_projection(x, stacked(adapters))
        products = shared.result
        own = iter(products.split([m.rank for m in sharing], dim=1))
    ys, parts = [], []
    for m in members:
        xa = first = None
        if m.lora_a is not None and m.rank:
            if drops(m):
                first = plan_projection(dropout_cuda(x, m.dropout_p, m.seed), m.lora_a)
                xa = first.result
            else:
                xa, first, shared = next(own), shared, None
            parts.append(xa)
        b = None if xa is None else m.lora_b
        ys.append(fused_matmul(x, m.weight, m.bias, xa, b, m.scaling, first, path))
    if len(parts) > len(sharing):
        products = torch.cat(parts, dim=1)
    return ys, products
