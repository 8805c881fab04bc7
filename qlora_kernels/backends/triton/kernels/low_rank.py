"""The thin products of an adapter, each one pass over its large operand: xa = dropout(x) Aᵀ; u and
grad_B from grad_y; grad_A from x. Sums over programs are partial results that `_reduce_kernel` adds
in order: no atomics, so two runs agree in every bit."""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.dropout import dropout_tile
from qlora_kernels.backends.triton.kernels.tiles import dot_tile, round_tile, widen_tile


@triton.jit
def _reduce_kernel(
    partials_ptr, bias_ptr, out_ptr, cols, out_pitch, count, scale, PARTS, TILE: tl.constexpr
):
    """out [rows, cols] = scale·(sum of PARTS partials in order) + bias, rounded once."""
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offs < count
    total = tl.zeros((TILE,), tl.float32)
    first = tl.zeros((), tl.int64)
    for _ in range(PARTS):
        total += tl.load(partials_ptr + first + offs, mask=mask, other=0.0)
        first += count
    total = total * scale
    row = offs // cols
    col = offs - row * cols
    if bias_ptr is not None:
        total += widen_tile(tl.load(bias_ptr + col, mask=mask, other=0.0))
    out = round_tile(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_pitch + col, out, mask=mask)


@triton.jit
def _dropped(x, first, seed_ptr, threshold, keep_scale, ALIGNED: tl.constexpr):
    """dropout of a tile of x, rounded to x's dtype; x itself without a seed."""
    if seed_ptr is not None:
        dropped = dropout_tile(
            widen_tile(x), first, tl.load(seed_ptr), threshold, keep_scale, ALIGNED
        )
        return round_tile(dropped, x.dtype)
    else:
        return x


@triton.jit(do_not_specialize=["M", "threshold"])
def _down_kernel(
    x_ptr,
    lora_a_ptr,
    seed_ptr,
    out_ptr,
    copy_ptr,
    M,
    K,
    R,
    copy_pitch,
    cols_per_split,
    threshold,
    keep_scale,
    scaling,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_R: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """xa [M,R] = dropout(x) Aᵀ; with splits over K (axis 1) fp32 [splits, M, R] partial sums.

    With copy_ptr [M, copy_pitch] also copies x there, and scaling·xa behind it: the left operand of
    one GEMM over K + R. The copy wants all of R in one tile and one split.
    """
    offs_m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    split = tl.program_id(1)
    offs_r = tl.program_id(2) * TILE_R + tl.arange(0, TILE_R)
    mask_m = offs_m < M
    mask_r = offs_r < R
    row_m = offs_m.to(tl.int64)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty

    acc = tl.zeros((TILE_M, TILE_R), tl.float32)
    first = split * cols_per_split
    for k in range(first, min(first + cols_per_split, K), TILE_K):
        offs_k = k + tl.arange(0, TILE_K)
        mask_x = mask_m[:, None]
        mask_a = mask_r[:, None]
        if not EVEN_K:
            mask_x = mask_x & (offs_k < K)[None, :]
            mask_a = mask_a & (offs_k < K)[None, :]
        x = tl.load(x_ptr + row_m[:, None] * K + offs_k[None, :], mask=mask_x, other=0.0)
        if copy_ptr is not None:
            tl.store(copy_ptr + row_m[:, None] * copy_pitch + offs_k[None, :], x, mask=mask_x)
        lora_a = tl.load(
            lora_a_ptr + offs_r.to(tl.int64)[:, None] * K + offs_k[None, :], mask=mask_a, other=0.0
        )
        x = _dropped(x, row_m * K + k, seed_ptr, threshold, keep_scale, ALIGNED)
        acc = dot_tile(x, round_tile(widen_tile(lora_a), DTYPE).T, acc)

    out_ptrs = out_ptr + (split.to(tl.int64) * M + row_m)[:, None] * R + offs_r[None, :]
    xa = round_tile(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, xa, mask=mask_m[:, None] & mask_r[None, :])
    if copy_ptr is not None:
        # Columns of the padding up to TILE_R take the zeros that masked rows of A gave.
        tail = round_tile(widen_tile(xa) * scaling, DTYPE)
        tail_ptrs = copy_ptr + row_m[:, None] * copy_pitch + (K + offs_r)[None, :]
        tl.store(tail_ptrs, tail, mask=mask_m[:, None])


@triton.jit(do_not_specialize=["M"])
def _up_gradients_kernel(
    grad_y_ptr,
    lora_b_ptr,
    xa_ptr,
    u_parts_ptr,
    b_parts_ptr,
    copy_ptr,
    M,
    N,
    R,
    copy_pitch,
    rows_per_slice,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_R: tl.constexpr,
    NEED_U: tl.constexpr,
    NEED_B: tl.constexpr,
):
    """One pass over grad_y: u_parts fp32 [tiles of N, M, R] of grad_y B, and b_parts fp32
    [slices of M, N, R] of grad_yᵀ xa. With copy_ptr [M, copy_pitch] grad_y is copied there too."""
    tile_n = tl.program_id(0)
    slice_m = tl.program_id(1)
    offs_n = tile_n * TILE_N + tl.arange(0, TILE_N)
    offs_r = tl.program_id(2) * TILE_R + tl.arange(0, TILE_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    row_n = offs_n.to(tl.int64)
    DTYPE: tl.constexpr = grad_y_ptr.dtype.element_ty

    if NEED_U:
        lora_b = tl.load(
            lora_b_ptr + row_n[:, None] * R + offs_r[None, :],
            mask=mask_n[:, None] & mask_r[None, :],
            other=0.0,
        )
        lora_b = round_tile(widen_tile(lora_b), DTYPE)
    grad_b = tl.zeros((TILE_N, TILE_R), tl.float32)
    first = slice_m * rows_per_slice
    for m in range(first, min(first + rows_per_slice, M), TILE_M):
        offs_m = m + tl.arange(0, TILE_M)
        mask_m = offs_m < M
        row_m = offs_m.to(tl.int64)
        mask_g = mask_m[:, None] & mask_n[None, :]
        grad_y = tl.load(grad_y_ptr + row_m[:, None] * N + offs_n[None, :], mask=mask_g, other=0.0)
        if copy_ptr is not None:
            tl.store(copy_ptr + row_m[:, None] * copy_pitch + offs_n[None, :], grad_y, mask=mask_g)
        mask_thin = mask_m[:, None] & mask_r[None, :]
        if NEED_U:
            u = dot_tile(grad_y, lora_b, tl.zeros((TILE_M, TILE_R), tl.float32))
            u_row = tile_n.to(tl.int64) * M + row_m
            tl.store(u_parts_ptr + u_row[:, None] * R + offs_r[None, :], u, mask=mask_thin)
        if NEED_B:
            xa = tl.load(xa_ptr + row_m[:, None] * R + offs_r[None, :], mask=mask_thin, other=0.0)
            grad_b = dot_tile(grad_y.T, xa, grad_b)
    if NEED_B:
        b_row = slice_m.to(tl.int64) * N + row_n
        tl.store(
            b_parts_ptr + b_row[:, None] * R + offs_r[None, :],
            grad_b,
            mask=mask_n[:, None] & mask_r[None, :],
        )


@triton.jit(do_not_specialize=["M", "threshold"])
def _down_gradient_kernel(
    x_ptr,
    u_ptr,
    seed_ptr,
    a_parts_ptr,
    M,
    K,
    R,
    rows_per_slice,
    threshold,
    keep_scale,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_R: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One pass over x: a_parts fp32 [slices of M, R, K] of uᵀ dropout(x)."""
    first_k = tl.program_id(0) * TILE_K
    slice_m = tl.program_id(1)
    offs_k = first_k + tl.arange(0, TILE_K)
    offs_r = tl.program_id(2) * TILE_R + tl.arange(0, TILE_R)
    mask_k = offs_k < K
    mask_r = offs_r < R

    grad_a = tl.zeros((TILE_K, TILE_R), tl.float32)
    first = slice_m * rows_per_slice
    for m in range(first, min(first + rows_per_slice, M), TILE_M):
        offs_m = m + tl.arange(0, TILE_M)
        mask_m = offs_m < M
        row_m = offs_m.to(tl.int64)
        x = tl.load(
            x_ptr + row_m[:, None] * K + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        u = tl.load(
            u_ptr + row_m[:, None] * R + offs_r[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        x = _dropped(x, row_m * K + first_k, seed_ptr, threshold, keep_scale, ALIGNED)
        grad_a = dot_tile(x.T, u, grad_a)
    a_row = slice_m.to(tl.int64) * R + offs_r
    tl.store(
        a_parts_ptr + a_row[:, None] * K + offs_k[None, :],
        grad_a.T,
        mask=mask_r[:, None] & mask_k[None, :],
    )
