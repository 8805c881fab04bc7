"""y = x Ŵᵀ for few tokens: 16-bit table values times x, and scales on the sums of a block.

A block's weights share a scale, so it multiplies the block's sum: once a token instead of once a
weight. Ŵ is then rounded once as well, its table value instead of the product with its scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.prmt import byte_tables, decode_words_prmt, table_range
from qlora_kernels.backends.triton.kernels.tiles import (
    decode_scales_tile,
    dot_tile,
    lookup_tile,
    round_tile,
    scale_tables,
    widen_tile,
)


@triton.jit(do_not_specialize=["M"])
def _few_tokens_kernel(
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
    STAGES: tl.constexpr,
):
    """y [M,N] = x Ŵᵀ + scaling·xa Bᵀ + bias, M ≤ TILE_M; with splits over K as in
    `_fused_forward_kernel`.

    A product is batched over GROUPS pieces of a row, each of one block, and warps share the
    batches: sums over K are split between warps and added at the end.
    """
    GROUP: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < 64 else 64
    GROUPS: tl.constexpr = TILE_K // GROUP
    WORDS: tl.constexpr = GROUP // 8
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    offs_n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    offs_m = tl.arange(0, TILE_M)
    split = tl.program_id(2)
    group = tl.arange(0, GROUPS)
    mask_n = offs_n < N
    mask_m = offs_m < M
    row = offs_n.to(tl.int64)

    acc = tl.zeros((GROUPS, TILE_N, TILE_M), tl.float32)
    if TILE_R > 0:  # noqa: SIM102 (decided when compiling, the other when running)
        if split == 0:
            # As further columns, batches of TILE_R of them.
            for first_r in tl.range(0, R, GROUPS * TILE_R, num_stages=1):
                offs_r = first_r + group[:, None] * TILE_R + tl.arange(0, TILE_R)[None, :]
                mask_r = (offs_r < R)[:, None, :]
                lora_b = tl.load(
                    lora_b_ptr + row[None, :, None] * R + offs_r[:, None, :],
                    mask=mask_n[None, :, None] & mask_r,
                    other=0.0,
                )
                xa = tl.load(
                    xa_ptr + offs_m[None, :, None] * R + offs_r[:, None, :],
                    mask=mask_m[None, :, None] & mask_r,
                    other=0.0,
                )
                acc = dot_tile(round_tile(widen_tile(lora_b), DTYPE), xa.permute(0, 2, 1), acc)
            acc = acc * scaling

    scale_offset, scale_codebook = scale_tables(scale_offset_ptr, scale_codebook_ptr, DOUBLE_QUANT)
    up = 1.0
    if tl.float16 == DTYPE:
        up, down = table_range(codebook_ptr, (1, 1, 1))
    tables = byte_tables(codebook_ptr, up, DTYPE, (1, 1, 1))
    offs_word = group[:, None, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    offs_k = group[:, None, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    word_ptrs = words_ptr + (row * (codes_stride // 4))[None, :, None] + offs_word
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :, None] * K + offs_k
    # Of a group in a row.
    first_element = row[None, :] * K + group[:, None] * GROUP
    first = split * tiles_per_split
    last = min(first + tiles_per_split, tl.cdiv(K, TILE_K))
    last_block = (row * K + (K - 1))[None, :] // BLOCK_SIZE
    if DOUBLE_QUANT:
        scales = decode_scales_tile(
            tl.minimum((first_element + first * TILE_K) // BLOCK_SIZE, last_block),
            mask_n[None, :],
            absmax_ptr,
            scale_codes_ptr,
            scale_absmax_ptr,
            scale_offset,
            scale_codebook,
            SCALE_BLOCK_SIZE,
            True,
        )
    # With stages by name Triton also pipelines loads that are no operand of the product.
    for tile in tl.range(first, last, num_stages=STAGES):
        k = tile * TILE_K
        mask_word = mask_n[None, :, None]
        mask_x = mask_m[None, :, None]
        if not EVEN_K:
            inside = group * GROUP < K - k
            mask_word = mask_word & inside[:, None, None]
            mask_x = mask_x & inside[:, None, None]
        words = tl.load(word_ptrs + k // 8, mask=mask_word, other=0)
        x = tl.load(x_ptrs + k, mask=mask_x, other=0.0)
        if DOUBLE_QUANT:
            # Triton does not load single bytes ahead of an iteration: these are the next one's.
            # Groups beyond K, for which x is 0, take the last block's.
            following = tl.minimum((first_element + (k + TILE_K)) // BLOCK_SIZE, last_block)
            scale_codes = tl.load(scale_codes_ptr + following, mask=mask_n[None, :], other=0)
            per_scale = tl.load(
                scale_absmax_ptr + following // SCALE_BLOCK_SIZE, mask=mask_n[None, :], other=0.0
            )
        else:
            block = tl.minimum((first_element + k) // BLOCK_SIZE, last_block)
            scales = tl.load(absmax_ptr + block, mask=mask_n[None, :], other=0.0)
        # A sum over k may run in any order. In this one the elements that a lane of a matrix
        # instruction holds, pairs 2t and 2t + 1 of each eight and of the next eight, are
        # neighbours: they come from one word of codes and 16 bytes of x.
        weight = decode_words_prmt(words, tables, DTYPE)
        weight = weight.reshape(GROUPS, TILE_N, 4, WORDS // 4, 2, 2, 2)
        weight = weight.permute(0, 1, 3, 5, 2, 4, 6).reshape(GROUPS, TILE_N, GROUP)
        x = x.reshape(GROUPS, TILE_M, 4, WORDS // 4, 2, 2, 2)
        x = x.permute(0, 3, 5, 2, 4, 6, 1).reshape(GROUPS, GROUP, TILE_M)
        sums = dot_tile(weight, x, tl.zeros((GROUPS, TILE_N, TILE_M), tl.float32))
        factors = scales[:, :, None]
        if tl.float16 == DTYPE:
            factors = factors * down
        acc = tl.fma(sums, factors, acc)
        if DOUBLE_QUANT:
            values = lookup_tile(scale_codebook, scale_codes.to(tl.int32))
            scales = values * per_scale + scale_offset

    y = tl.sum(acc, axis=0)
    if bias_ptr is not None:
        y += widen_tile(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))[:, None]
    y_ptrs = y_ptr + (split.to(tl.int64) * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, round_tile(y, y_ptr.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])
