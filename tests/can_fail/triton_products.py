"""Wrong products in Triton, each with the test that must catch it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.can_fail.triton_mutation import BF16, FP16, TritonMutation
from tests.triton.interpreter import test_matmul as matmul
from tests.triton.interpreter import test_prmt as prmt


def _fused(index: int) -> Callable[[torch.device], None]:
    return lambda device: matmul.test_qlora_fused(device, matmul.FUSED[index])


def _splits(device: torch.device) -> None:
    matmul.test_splits_share_the_sum(device, FP16, "absmax")


def _replay(device: torch.device) -> None:
    matmul.test_dropout_is_that_of_the_reference(device, 192)


PRODUCTS = (
    TritonMutation(
        "decodes_a_words_bytes_in_the_wrong_order",
        "tiles",
        "tl.join(words >> 12, words >> 28)",
        "tl.join(words >> 28, words >> 12)",
        _fused(5),
    ),
    TritonMutation(
        "multiplies_one_token_with_its_neighbours_weight",
        "quantized_matmul",
        "tl.fma(w2, x2[None, :], fours)",
        "tl.fma(w2, x3[None, :], fours)",
        _fused(8),
    ),
    TritonMutation(
        "multiplies_with_the_scales_of_the_first_row",
        "quantized_matmul",
        "(row[:, None] * n_cols + offs_group[None, :]) // BLOCK_SIZE",
        "(row[:, None] * 0 + offs_group[None, :]) // BLOCK_SIZE",
        _fused(5),
    ),
    TritonMutation(
        "sums_two_blocks_before_one_scale",
        "quantized_matmul",
        "BLOCK_SIZE if BLOCK_SIZE < 32 else 32",
        "64",
        _fused(8),
    ),
    TritonMutation(
        "skips_the_last_tile_of_k",
        "quantized_matmul",
        "last = min(first + tiles_per_split, tl.cdiv(K, TILE_K))",
        "last = min(first + tiles_per_split, K // TILE_K)",
        _fused(5),
    ),
    TritonMutation(
        "does_not_scale_the_adapter",
        "quantized_matmul",
        "acc = acc * scaling",
        "acc = acc * 1.0",
        _fused(5),
    ),
    TritonMutation(
        "adds_the_adapter_in_every_split",
        "quantized_matmul",
        "if split == 0:",
        "if split >= 0:",
        _splits,
    ),
    TritonMutation(
        "forgets_the_bias",
        "quantized_matmul",
        "acc += widen_tile(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))[:, None]",
        "acc += 0.0",
        _fused(5),
    ),
    TritonMutation(
        "accumulates_in_the_narrow_type",
        "quantized_matmul",
        "acc = dot_tile(weight, x.T, acc)",
        "acc = widen_tile(round_tile(dot_tile(weight, x.T, acc), DTYPE))",
        lambda device: matmul.test_long_sums_are_not_rounded_on_their_way(device, BF16),
    ),
    TritonMutation(
        "multiplies_one_token_without_the_adapters_scaling",
        "quantized_matmul",
        "tl.sum(lora_b * xa[None, :], axis=1) * scaling",
        "tl.sum(lora_b * xa[None, :], axis=1)",
        _fused(8),
    ),
    TritonMutation(
        "overwrites_instead_of_accumulating",
        "quantized_matmul_backward",
        "    if ACCUMULATE:\n",
        "    if ACCUMULATE and TILE_R > 0:\n",
        _splits,
    ),
    TritonMutation(
        "accumulates_grad_x_in_the_narrow_type",
        "quantized_matmul_backward",
        "acc = dot_tile(weight.T, grad_y.T, acc)",
        "acc = widen_tile(round_tile(dot_tile(weight.T, grad_y.T, acc), DTYPE))",
        lambda device: matmul.test_long_sums_are_not_rounded_on_their_way(device, BF16),
    ),
    TritonMutation(
        "replays_dropout_from_the_start_of_a_row",
        "quantized_matmul_backward",
        "acc.T, row_m * K + first_k, tl.load(seed_ptr)",
        "acc.T, row_m * K, tl.load(seed_ptr)",
        _replay,
    ),
    TritonMutation(
        "drops_from_the_base_as_well",
        "quantized_matmul_backward",
        "    grad_x = acc.T\n",
        "    grad_x = acc.T * (2 - 1)\n    if seed_ptr is not None:\n        grad_x = dropout_tile("
        "grad_x, row_m * K + first_k, tl.load(seed_ptr), threshold, 1.0, EVEN_K)\n",
        _replay,
    ),
    TritonMutation(
        "leaves_the_last_rows_of_the_sum_over_n_out",
        "quantized_matmul_backward",
        "for n in range(0, N, TILE_N):",
        "for n in range(0, N // TILE_N * TILE_N, TILE_N):",
        _fused(4),
    ),
    TritonMutation(
        "loses_the_last_partial_sum",
        "low_rank",
        "for _ in range(PARTS):",
        "for _ in range(PARTS - 1):",
        _splits,
    ),
    TritonMutation(
        "masks_the_adapters_input_at_another_place",
        "low_rank",
        "_dropped(x, row_m * K + k, seed_ptr",
        "_dropped(x, row_m * K, seed_ptr",
        _replay,
    ),
    TritonMutation(
        "masks_another_x_for_grad_a",
        "low_rank",
        "_dropped(x, row_m * K + first_k, seed_ptr",
        "_dropped(x, row_m * K, seed_ptr",
        _replay,
    ),
    TritonMutation(
        "extends_x_without_scaling",
        "low_rank",
        "round_tile(widen_tile(xa) * scaling, DTYPE)",
        "round_tile(widen_tile(xa) * 1.0, DTYPE)",
        lambda device: matmul.test_qlora_dense(device, (64, 96), 0.0, BF16),
    ),
    TritonMutation(
        "takes_the_first_tile_of_ranks_for_all",
        "low_rank",
        "offs_r = tl.program_id(2) * TILE_R + tl.arange(0, TILE_R)",
        "offs_r = tl.program_id(2) * 0 + tl.arange(0, TILE_R)",
        _fused(5),
        count=3,
    ),
)

FEW_TOKENS = (
    TritonMutation(
        "takes_few_tokens_scales_one_group_on",
        "few_tokens",
        "block = tl.minimum((first_element + k) // BLOCK_SIZE, last_block)",
        "block = tl.minimum((first_element + k + GROUP) // BLOCK_SIZE, last_block)",
        _fused(3),
    ),
    TritonMutation(
        "takes_few_tokens_double_quantized_scales_a_tile_late",
        "few_tokens",
        "following = tl.minimum((first_element + (k + TILE_K))",
        "following = tl.minimum((first_element + k)",
        _fused(0),
    ),
    TritonMutation(
        "begins_every_split_with_the_first_scales",
        "few_tokens",
        "tl.minimum((first_element + first * TILE_K) // BLOCK_SIZE, last_block),",
        "tl.minimum(first_element // BLOCK_SIZE, last_block),",
        lambda device: matmul.test_few_tokens_in_splits(device, "nested"),
    ),
    TritonMutation(
        "permutes_few_tokens_x_in_another_order",
        "few_tokens",
        "x.permute(0, 3, 5, 2, 4, 6, 1)",
        "x.permute(0, 3, 4, 2, 5, 6, 1)",
        _fused(2),
    ),
    TritonMutation(
        "adds_few_tokens_adapter_in_every_split",
        "few_tokens",
        "if split == 0:",
        "if split >= 0:",
        lambda device: matmul.test_few_tokens_in_splits(device, "absmax"),
    ),
    TritonMutation(
        "leaves_ranks_beyond_the_first_tile_out",
        "few_tokens",
        "for first_r in tl.range(0, R, GROUPS * TILE_R, num_stages=1):",
        "for first_r in tl.range(0, min(R, GROUPS * TILE_R), GROUPS * TILE_R, num_stages=1):",
        _fused(4),
    ),
    TritonMutation(
        "skips_few_tokens_last_tile_of_k",
        "few_tokens",
        "last = min(first + tiles_per_split, tl.cdiv(K, TILE_K))",
        "last = min(first + tiles_per_split, K // TILE_K)",
        _fused(2),
    ),
    TritonMutation(
        "does_not_undo_the_factor_of_a_table",
        "few_tokens",
        "factors = factors * down",
        "factors = factors * (down / down)",
        lambda device: matmul.test_tables_that_fp16_does_not_hold(device, FP16),
    ),
    TritonMutation(
        "rounds_a_table_that_fp16_does_not_hold",
        "prmt",
        "exponent = tl.minimum(tl.maximum(largest >> 23, 1), 253)",
        "exponent = tl.maximum(largest * 0, 127)",
        lambda device: matmul.test_tables_that_fp16_does_not_hold(device, FP16),
    ),
    TritonMutation(
        "swaps_the_bytes_of_a_table",
        "prmt",
        "high = high | ((bits >> 8) << (8 * byte))",
        "high = high | ((bits >> 8) << (24 - 8 * byte))",
        lambda device: prmt.test_every_byte_of_every_table(device, FP16),
    ),
    TritonMutation(
        "selects_with_unmasked_codes",
        "prmt",
        "and.b32 codes, $4, 0x77777777;",
        "and.b32 codes, $4, 0x7777777F;",
        lambda device: prmt.test_every_byte_of_every_table(device, BF16),
    ),
    TritonMutation(
        "selects_halves_one_place_on",
        "prmt",
        "shr.u32 half, half, 16;",
        "shr.u32 half, half, 12;",
        lambda device: prmt.test_every_byte_of_every_table(device, BF16),
    ),
    TritonMutation(
        "scales_with_the_upper_half_alone",
        "prmt",
        "fma.rn.bf16x2 $2, $2, $13, small;",
        "fma.rn.bf16x2 $2, $2, $13, minus_zero;",
        prmt.test_scaled_pairs_round_like_their_parts,
    ),
    TritonMutation(
        "unpacks_the_upper_half_first",
        "prmt",
        "return tl.join(even, odd)",
        "return tl.join(odd, even)",
        prmt.test_pairs_are_unpacked_in_order,
    ),
    TritonMutation(
        "scales_pairs_with_their_rows_first_group",
        "quantized_matmul",
        "tl.broadcast_to(scales[:, :, None], grouped.shape)",
        "tl.broadcast_to(tl.min(scales, 1, keep_dims=True)[:, :, None], grouped.shape)",
        lambda device: matmul.test_splits_share_the_sum(device, BF16, "absmax"),
    ),
)
