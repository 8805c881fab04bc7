"""The adapter's own products in CUDA: csrc/kernels/low_rank.cu and low_rank_gradients_sm80.cu."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlora_kernels.backends.cuda.common import at_vector, contiguous, current_stream
from qlora_kernels.backends.cuda.gradient_path import (
    GradientSizes,
    choose_gradient_path,
    choose_token_slices,
    projects_while_copying,
)
from qlora_kernels.backends.device import device_facts


class Projection(NamedTuple):
    """result [M,R] = x [M,K] · adapterᵀ [R,K], rounded to x's dtype, that is yet to be computed: by
    the product that reads it, whose kernel then overlaps this one's. A token's bits do not depend
    on M."""

    x: torch.Tensor
    adapter: torch.Tensor
    result: torch.Tensor


def plan_projection(x: torch.Tensor, adapter: torch.Tensor) -> Projection:
    """The projection of x by an adapter, with memory for its result."""
    result = x.new_empty(len(x), len(adapter))
    return Projection(at_vector(x), contiguous(adapter.detach()), result)


def run_projection(projection: Projection) -> torch.Tensor:
    """The result, computed on its own."""
    torch.ops.qlora_kernels_cuda.down_projection.default(
        *projection, current_stream(projection.result)
    )
    return projection.result


def projects_into(x: torch.Tensor, rank: int) -> bool:
    """Whether `project_into` costs less than a GEMM and a copy of x [M,K]."""
    sizes = GradientSizes(len(x), x.shape[1], rank, x.dtype, x.dtype, True, False)
    # The kernel writes 16 bytes at a time.
    return x.shape[1] % 8 == 0 and projects_while_copying(sizes)


def project_into(x: torch.Tensor, lora_a: torch.Tensor, extended: torch.Tensor) -> torch.Tensor:
    """xa [M,R] = x lora_aᵀ, rounded once to x's dtype, while `extended` [M, K + T] becomes
    [x | xa | 0]; where `projects_into` says so.

    Args:
        x: [M,K].
        lora_a: [R,K] of any dtype.
    """
    sizes = GradientSizes(len(x), x.shape[1], len(lora_a), x.dtype, x.dtype, True, False)
    slices = choose_token_slices(sizes, device_facts(x.device).sm_count)
    return run_column_product(at_vector(x), contiguous(lora_a.detach()), slices, extended)


def up_products(
    grad_y: torch.Tensor,
    xa: torch.Tensor,
    lora_b: torch.Tensor | None,
    scaling: float,
    need_u: bool,
    need_b: bool,
    extended: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """`u_and_grad_b`, or the one of its products that is needed; None for the other."""
    assert lora_b is not None
    if need_u and need_b:
        return u_and_grad_b(grad_y, xa, lora_b, scaling, extended)
    if need_b:
        return None, token_product(grad_y, xa, scaling, lora_b.dtype), False
    return product_with_b(grad_y, lora_b, scaling), None, False


def product_with_b(grad_y: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """u [M,R] = scaling · grad_y lora_b, rounded once to grad_y's dtype."""
    b = lora_b.detach().to(grad_y.dtype)
    # alpha scales the fp32 sums: one rounding.
    return torch.addmm(grad_y.new_empty(()), grad_y, b, beta=0, alpha=scaling)


def u_and_grad_b(
    grad_y: torch.Tensor,
    xa: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    extended: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """u [M,R] = scaling · grad_y lora_b and grad_b [N,R] = scaling · grad_yᵀ xa.

    Args:
        grad_y: [M,N].
        xa: [M,R] of grad_y's dtype.
        lora_b: [N,R]; grad_b is of its dtype.
        extended: [M, N + T] of grad_y's dtype, perhaps columns of a wider matrix; T >= R, or 0.

    Returns:
        u, grad_b, and whether `extended` now is [grad_y | u | 0], or grad_y where T is 0; otherwise
        it is as it was.
    """
    (tokens, cols), rank = grad_y.shape, xa.shape[1]
    sizes = GradientSizes(tokens, cols, rank, grad_y.dtype, lora_b.dtype, True)
    sm_count = device_facts(grad_y.device).sm_count
    if choose_gradient_path(sizes, sm_count) == "gemm":
        u = product_with_b(grad_y, lora_b, scaling)
        return u, token_product(grad_y, xa, scaling, lora_b.dtype), False
    # The kernel writes 16 bytes at a time.
    if extended is not None and (
        cols % 8 or extended.stride(0) % 8 or extended.data_ptr() % 16 or extended.shape[1] % 8
    ):
        extended = None
    u, grad_b = run_adapter_gradients(
        at_vector(grad_y),
        contiguous(xa),
        contiguous(lora_b.detach()),
        scaling,
        choose_token_slices(sizes, sm_count),
        extended,
    )
    return u, grad_b, extended is not None


def copies_grad_y(grad_y: torch.Tensor, rank: int, adapter_dtype: torch.dtype) -> bool:
    """Whether `u_and_grad_b` writes `extended` in its own pass over grad_y."""
    (tokens, cols) = grad_y.shape
    sizes = GradientSizes(tokens, cols, rank, grad_y.dtype, adapter_dtype, True)
    sm_count = device_facts(grad_y.device).sm_count
    return cols % 8 == 0 and choose_gradient_path(sizes, sm_count) == "kernel"


def token_product(
    data: torch.Tensor,
    left: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    rank_major: bool = False,
) -> torch.Tensor:
    """scaling · dataᵀ left of data [M,C] and left [M,R], rounded once to `dtype` where that is
    fp32 or the data's.

    Returns:
        [C,R], or [R,C] with `rank_major`.
    """
    (tokens, cols), rank = data.shape, left.shape[1]
    sizes = GradientSizes(tokens, cols, rank, data.dtype, dtype, False)
    sm_count = device_facts(data.device).sm_count
    if choose_gradient_path(sizes, sm_count) == "gemm":
        first, second = (left, data) if rank_major else (data, left)
        product = torch.addmm(data.new_empty(()), first.t(), second, beta=0, alpha=scaling)
        return product.to(dtype)
    slices = choose_token_slices(sizes, sm_count)
    return run_token_product(at_vector(data), contiguous(left), scaling, slices, dtype, rank_major)


def run_adapter_gradients(
    grad_y: torch.Tensor,
    xa: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    token_slices: int,
    extended: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The launches behind `u_and_grad_b`; contiguous operands."""
    (tokens, cols), rank = grad_y.shape, xa.shape[1]
    ops = torch.ops.qlora_kernels_cuda
    u, grad_b = grad_y.new_empty(tokens, rank), torch.empty_like(lora_b)
    scratch = ops.gradient_scratch.default(tokens, cols, rank, token_slices, True, True)
    ops.adapter_gradients.default(
        grad_y,
        xa,
        lora_b,
        scaling,
        token_slices,
        u,
        grad_b,
        extended,
        grad_y.new_empty(scratch, dtype=torch.float32),
        current_stream(grad_y),
    )
    return u, grad_b


def run_token_product(
    data: torch.Tensor,
    left: torch.Tensor,
    scaling: float,
    token_slices: int,
    dtype: torch.dtype,
    rank_major: bool,
) -> torch.Tensor:
    """The launches behind `token_product`; contiguous operands."""
    (tokens, cols), rank = data.shape, left.shape[1]
    ops = torch.ops.qlora_kernels_cuda
    shape = (rank, cols) if rank_major else (cols, rank)
    out = data.new_empty(shape, dtype=dtype)
    scratch = ops.gradient_scratch.default(tokens, cols, rank, token_slices, True, False)
    ops.token_product.default(
        data,
        left,
        scaling,
        token_slices,
        rank_major,
        out,
        data.new_empty(scratch, dtype=torch.float32),
        current_stream(data),
    )
    return out


def run_column_product(
    x: torch.Tensor, adapter: torch.Tensor, token_slices: int, extended: torch.Tensor
) -> torch.Tensor:
    """The launches behind `project_into`; contiguous operands."""
    (tokens, cols), rank = x.shape, len(adapter)
    ops = torch.ops.qlora_kernels_cuda
    xa = x.new_empty(tokens, rank)
    scratch = ops.gradient_scratch.default(tokens, cols, rank, token_slices, False, True)
    ops.column_product.default(
        x,
        adapter,
        token_slices,
        xa,
        extended,
        x.new_empty(scratch, dtype=torch.float32),
        current_stream(x),
    )
    return xa
