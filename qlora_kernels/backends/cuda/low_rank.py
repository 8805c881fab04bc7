"""The adapter's own products in CUDA: csrc/kernels/low_rank.cu and low_rank_gradients_sm80.cu."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cuda.common import at_vector, contiguous, current_stream
from qlora_kernels.backends.cuda.gradient_path import (
    GradientSizes,
    choose_gradient_path,
    choose_token_slices,
    projects_while_copying,
)
from qlora_kernels.backends.device import device_facts


def down_projection(x: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
    """x [M,K] · adapterᵀ [R,K], rounded to x's dtype; a token's bits do not depend on M."""
    result = x.new_empty(len(x), len(adapter))
    torch.ops.qlora_kernels_cuda.down_projection.default(
        at_vector(x), contiguous(adapter.detach()), result, current_stream(x)
    )
    return result


def project_into(
    x: torch.Tensor, lora_a: torch.Tensor, extended: torch.Tensor
) -> torch.Tensor | None:
    """xa [M,R] = x lora_aᵀ, rounded once to x's dtype, while `extended` [M, K + T] becomes
    [x | xa | 0]; None, with nothing done, where a GEMM and copies cost less.

    Args:
        x: [M,K].
        lora_a: [R,K] of any dtype.
    """
    (tokens, cols), rank = x.shape, len(lora_a)
    sizes = GradientSizes(tokens, cols, rank, x.dtype, x.dtype, True)
    sm_count = device_facts(x.device).sm_count
    # The kernel writes 16 bytes at a time.
    if cols % 8 or extended.shape[1] % 8 or not projects_while_copying(sizes):
        return None
    slices = choose_token_slices(sizes, sm_count)
    return run_column_product(at_vector(x), contiguous(lora_a.detach()), slices, extended)


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
        extended: [M, N + T] of grad_y's dtype with T >= R.

    Returns:
        u, grad_b, and whether `extended` now is [grad_y | u | 0]; otherwise it is as it was.
    """
    (tokens, cols), rank = grad_y.shape, xa.shape[1]
    sizes = GradientSizes(tokens, cols, rank, grad_y.dtype, lora_b.dtype, True)
    sm_count = device_facts(grad_y.device).sm_count
    if choose_gradient_path(sizes, sm_count) == "gemm":
        u = product_with_b(grad_y, lora_b, scaling)
        return u, token_product(grad_y, xa, scaling, lora_b.dtype), False
    # The kernel writes 16 bytes at a time.
    if extended is not None and (cols % 8 or extended.shape[1] % 8):
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
