"""grad_x = grad_y Ŵ + dropout(u A), from the same codes as the forward: the tile is decoded row by
row and multiplied as its transpose, so no second copy of the weight is kept or made."""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.dropout import dropout_tile
from qlora_kernels.backends.triton.kernels.prmt import byte_tables
from qlora_kernels.backends.triton.kernels.quantized_matmul import weight_tile
from qlora_kernels.backends.triton.kernels.tiles import (
    dot_tile,
    round_tile,
    scale_tables,
    widen_tile,
)


@triton.jit(do_not_specialize=["M", "threshold"])
def _fused_backward_kernel(
    grad_y_ptr,
    codes_ptr,
    absmax_ptr,
    scale_codes_ptr,
    scale_absmax_ptr,
    scale_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    lora_a_ptr,
    u_ptr,
    seed_ptr,
    grad_x_ptr,
    M,
    N,
    K,
    R,
    codes_stride,
    threshold,
    keep_scale,
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DECODE: tl.constexpr,
):
    """grad_x [M,K]; ACCUMULATE adds to what is there (projections that share x)."""
    first_k = tl.program_id(0) * TILE_K
    offs_k = first_k + tl.arange(0, TILE_K)
    offs_m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    mask_k = offs_k < K
    mask_m = offs_m < M
    row_m = offs_m.to(tl.int64)
    DTYPE: tl.constexpr = grad_y_ptr.dtype.element_ty

    acc = tl.zeros((TILE_K, TILE_M), tl.float32)
    if TILE_R > 0:
        for first_r in tl.range(0, R, TILE_R, num_stages=1):
            offs_r = first_r + tl.arange(0, TILE_R)
            lora_a = tl.load(
                lora_a_ptr + offs_r.to(tl.int64)[:, None] * K + offs_k[None, :],
                mask=(offs_r < R)[:, None] & mask_k[None, :],
                other=0.0,
            )
            u = tl.load(
                u_ptr + row_m[:, None] * R + offs_r[None, :],
                mask=mask_m[:, None] & (offs_r < R)[None, :],
                other=0.0,
            )
            acc = dot_tile(round_tile(widen_tile(lora_a), DTYPE).T, u.T, acc)
        if seed_ptr is not None:
            acc = dropout_tile(
                acc.T, row_m * K + first_k, tl.load(seed_ptr), threshold, keep_scale, EVEN_K
            ).T

    scale_offset, scale_codebook = scale_tables(scale_offset_ptr, scale_codebook_ptr, DOUBLE_QUANT)
    if DECODE == "prmt":
        tables = byte_tables(codebook_ptr, 1.0, DTYPE, (1, 1, 1))
    else:
        tables = tl.load(codebook_ptr + tl.arange(0, 16))
    offs_n = tl.arange(0, TILE_N)
    grad_ptrs = grad_y_ptr + row_m[:, None] * N + offs_n[None, :]
    for n in range(0, N, TILE_N):
        weight = weight_tile(
            n + offs_n,
            first_k,
            N,
            K,
            codes_stride,
            codes_ptr,
            absmax_ptr,
            scale_codes_ptr,
            scale_absmax_ptr,
            scale_offset,
            tables,
            scale_codebook,
            TILE_K,
            EVEN_K,
            BLOCK_SIZE,
            SCALE_BLOCK_SIZE,
            DOUBLE_QUANT,
            DTYPE,
            DECODE,
        )
        grad_y = tl.load(grad_ptrs + n, mask=mask_m[:, None] & (offs_n < N - n)[None, :], other=0.0)
        acc = dot_tile(weight.T, grad_y.T, acc)

    grad_x_ptrs = grad_x_ptr + row_m[:, None] * K + offs_k[None, :]
    mask = mask_m[:, None] & mask_k[None, :]
    grad_x = acc.T
    if ACCUMULATE:
        grad_x += widen_tile(tl.load(grad_x_ptrs, mask=mask, other=0.0))
    tl.store(grad_x_ptrs, round_tile(grad_x, grad_x_ptr.dtype.element_ty), mask=mask)
