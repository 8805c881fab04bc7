"""Products with a quantized weight, decoded tile by tile: y = x Ŵᵀ and grad_x = grad_y Ŵ, each with
its adapter's term in the same accumulator.

The weight is the left operand: on sm_90 its decoded tile then goes from registers into wgmma, which
runs while the next tile is decoded; as the right operand it would have to be stored to shared
memory first, and Triton waits for each product before it decodes again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.prmt import byte_tables, decode_scaled_words_prmt
from qlora_kernels.backends.triton.kernels.tiles import (
    decode_scales_tile,
    decode_words_tile,
    dot_tile,
    round_tile,
    scale_rows_tile,
    scale_tables,
    widen_tile,
)


@triton.jit
def weight_tile(
    offs_row,
    first_col,
    n_rows,
    n_cols,
    codes_stride,
    codes_ptr,
    absmax_ptr,
    scale_codes_ptr,
    scale_absmax_ptr,
    scale_offset,
    tables,
    scale_codebook,
    COLS: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Ŵ[offs_row, first_col … first_col + COLS) in DTYPE; outside it some finite number, which the
    caller multiplies by 0 or does not store.

    DECODE "gather": `tables` is the codebook [16], and a value times its scale is rounded once.
    "prmt", for bf16: they are `byte_tables`, and the table's value is rounded before.

    n_cols is a multiple of GROUP = min(BLOCK_SIZE, 64), so that no GROUP straddles rows or blocks,
    and rows begin at words of four bytes, which codes are read in. codes_stride is n_cols / 2, an
    argument of its own because its divisibility by 16 is what makes those loads 16 bytes wide.
    """
    GROUP: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < 64 else 64
    GROUPS: tl.constexpr = COLS // GROUP
    row = offs_row.to(tl.int64)
    mask = (offs_row < n_rows)[:, None]
    offs_word = first_col // 8 + tl.arange(0, COLS // 8)
    offs_group = first_col + tl.arange(0, GROUPS) * GROUP
    mask_word = mask
    mask_group = mask
    if not EVEN_COLS:
        mask_word = mask & (offs_word * 4 < codes_stride)[None, :]
        mask_group = mask & (offs_group < n_cols)[None, :]
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    words = tl.load(
        words_ptr + row[:, None] * (codes_stride // 4) + offs_word[None, :], mask=mask_word, other=0
    )
    scales = decode_scales_tile(
        (row[:, None] * n_cols + offs_group[None, :]) // BLOCK_SIZE,
        mask_group,
        absmax_ptr,
        scale_codes_ptr,
        scale_absmax_ptr,
        scale_offset,
        scale_codebook,
        SCALE_BLOCK_SIZE,
        DOUBLE_QUANT,
    )
    if DECODE == "prmt":
        ROWS: tl.constexpr = words.shape[0]
        grouped = words.reshape(ROWS, GROUPS, GROUP // 8)
        scales = tl.broadcast_to(scales[:, :, None], grouped.shape)
        values = decode_scaled_words_prmt(grouped, scales, tables)
        return values.reshape(ROWS, COLS)
    else:
        return round_tile(scale_rows_tile(decode_words_tile(words, tables), scales, GROUPS), DTYPE)


@triton.jit(do_not_specialize=["M"])
def _fused_forward_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    scale_codes_ptr,
    scale_absmax_ptr,
    scale_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    lora_b_ptr,
    xa_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    codes_stride,
    tiles_per_split,
    scaling,
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    DECODE: tl.constexpr,
):
    """y [M,N] = x Ŵᵀ + scaling·xa Bᵀ + bias.

    With splits over K (grid axis 2), y is fp32 [splits, M, N]: partial sums for `_reduce_kernel`,
    the adapter's term in the first and the bias left to the reduction.
    """
    offs_n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    offs_m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    split = tl.program_id(2)
    mask_n = offs_n < N
    mask_m = offs_m < M
    row_m = offs_m.to(tl.int64)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty

    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    if TILE_R > 0:  # noqa: SIM102 (decided when compiling, the other when running)
        if split == 0:
            # First, so that it needs no accumulator of its own.
            for first_r in tl.range(0, R, TILE_R, num_stages=1):
                offs_r = first_r + tl.arange(0, TILE_R)
                mask_r = (offs_r < R)[None, :]
                lora_b = tl.load(
                    lora_b_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :],
                    mask=mask_n[:, None] & mask_r,
                    other=0.0,
                )
                xa = tl.load(
                    xa_ptr + row_m[:, None] * R + offs_r[None, :],
                    mask=mask_m[:, None] & mask_r,
                    other=0.0,
                )
                acc = dot_tile(round_tile(widen_tile(lora_b), DTYPE), xa.T, acc)
            acc = acc * scaling

    scale_offset, scale_codebook = scale_tables(scale_offset_ptr, scale_codebook_ptr, DOUBLE_QUANT)
    if DECODE == "prmt":
        tables = byte_tables(codebook_ptr, 1.0, DTYPE, (1, 1, 1))
    else:
        tables = tl.load(codebook_ptr + tl.arange(0, 16))
    offs_k = tl.arange(0, TILE_K)
    x_ptrs = x_ptr + row_m[:, None] * K + offs_k[None, :]
    first = split * tiles_per_split
    last = min(first + tiles_per_split, tl.cdiv(K, TILE_K))
    for tile in range(first, last):
        k = tile * TILE_K
        weight = weight_tile(
            offs_n,
            k,
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
        mask_x = mask_m[:, None]
        if not EVEN_K:
            mask_x = mask_x & (offs_k < K - k)[None, :]
        x = tl.load(x_ptrs + k, mask=mask_x, other=0.0)
        acc = dot_tile(weight, x.T, acc)

    if bias_ptr is not None:
        acc += widen_tile(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))[:, None]
    y_ptrs = y_ptr + (split.to(tl.int64) * M + row_m)[:, None] * N + offs_n[None, :]
    tl.store(
        y_ptrs, round_tile(acc.T, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :]
    )


@triton.jit
def _one_token_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    scale_codes_ptr,
    scale_absmax_ptr,
    scale_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    lora_b_ptr,
    xa_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    R,
    codes_stride,
    scaling,
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y [1, N] of one token: fp32 products and sums, Ŵ not rounded.

    A matrix instruction would be idle but for one of its eight columns, and would want the decoded
    tile in another layout than the one it is loaded in. 32 neighbouring codes are of one block (16
    of the smallest), so their products are summed before they meet the scale.
    """
    GROUP: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < 32 else 32
    GROUPS: tl.constexpr = TILE_K // GROUP
    offs_n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    mask_n = offs_n < N
    row = offs_n.to(tl.int64)[:, None]
    offs_k = tl.arange(0, TILE_K)
    offs_word = tl.arange(0, TILE_K // 8)
    offs_group = tl.arange(0, GROUPS)
    scale_offset, scale_codebook = scale_tables(scale_offset_ptr, scale_codebook_ptr, DOUBLE_QUANT)
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    word_ptrs = words_ptr + row * (codes_stride // 4) + offs_word[None, :]

    acc = tl.zeros((TILE_N, GROUPS), tl.float32)
    for tile in tl.range(0, tl.cdiv(K, TILE_K), num_stages=STAGES):
        k = tile * TILE_K
        mask_word = mask_n[:, None]
        mask_group = mask_n[:, None]
        mask_x = None
        if not EVEN_K:
            mask_word = mask_word & (offs_word * 8 < K - k)[None, :]
            mask_group = mask_group & (offs_group * GROUP < K - k)[None, :]
            mask_x = offs_k < K - k
        words = tl.load(word_ptrs + k // 8, mask=mask_word, other=0)
        scales = decode_scales_tile(
            (row * K + (k + offs_group * GROUP)[None, :]) // BLOCK_SIZE,
            mask_group,
            absmax_ptr,
            scale_codes_ptr,
            scale_absmax_ptr,
            scale_offset,
            scale_codebook,
            SCALE_BLOCK_SIZE,
            DOUBLE_QUANT,
        )
        x = widen_tile(tl.load(x_ptr + k + offs_k, mask=mask_x, other=None if EVEN_K else 0.0))
        # Four neighbours by one product and three fused multiply-adds: fewer additions. Element j
        # of four is in w<j>, and what it is multiplied with in x<j>.
        x_even, x_odd = tl.split(x.reshape(TILE_K // 2, 2))
        x0, x2 = tl.split(x_even.reshape(TILE_K // 4, 2))
        x1, x3 = tl.split(x_odd.reshape(TILE_K // 4, 2))
        weight = decode_words_tile(words, codebook)
        even, odd = tl.split(weight.reshape(TILE_N, TILE_K // 2, 2))
        w0, w2 = tl.split(even.reshape(TILE_N, TILE_K // 4, 2))
        w1, w3 = tl.split(odd.reshape(TILE_N, TILE_K // 4, 2))
        fours = tl.fma(w1, x1[None, :], w0 * x0[None, :])
        fours = tl.fma(w2, x2[None, :], fours)
        fours = tl.fma(w3, x3[None, :], fours)
        acc = tl.fma(tl.sum(fours.reshape(TILE_N, GROUPS, GROUP // 4), axis=2), scales, acc)

    y = tl.sum(acc, axis=1)
    if TILE_R > 0:
        offs_r = tl.arange(0, TILE_R)
        mask_r = offs_r < R
        lora_b = tl.load(
            lora_b_ptr + row * R + offs_r[None, :],
            mask=mask_n[:, None] & mask_r[None, :],
            other=0.0,
        )
        lora_b = widen_tile(round_tile(widen_tile(lora_b), x_ptr.dtype.element_ty))
        xa = widen_tile(tl.load(xa_ptr + offs_r, mask=mask_r, other=0.0))
        y += tl.sum(lora_b * xa[None, :], axis=1) * scaling
    if bias_ptr is not None:
        y += widen_tile(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))
    tl.store(y_ptr + offs_n, round_tile(y, y_ptr.dtype.element_ty), mask=mask_n)
