"""Wrong Triton kernels, each with the test that must catch it. Run in the interpreter by
tests/triton/interpreter/test_can_fail.py.

No mutation reaches beyond a tensor's memory: the interpreter would write there. What no bound can
tell is left out: sums in another order, an operand that is not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.triton.interpreter import test_codecs as codecs
from tests.triton.interpreter import test_dequantize_many as many
from tests.triton.interpreter import test_matmul as matmul

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class TritonMutation:
    """One wrong kernel.

    Attributes:
        what: the fault, as the test's name.
        file: of qlora_kernels/backends/triton/kernels, without its suffix.
        old, new: the change; `old` must occur exactly `count` times.
        check: a test of the kernels, which must fail with an AssertionError.
        count: how often `old` occurs.
    """

    what: str
    file: str
    old: str
    new: str
    check: Callable[[torch.device], None]
    count: int = 1


def _dequantize(device: torch.device) -> None:
    codecs.test_dequantize_equals_reference(device, 64, "nested", FP32)


def _quantize(device: torch.device) -> None:
    codecs.test_quantize_equals_reference(device, 64, FP32)


def _fused(index: int) -> Callable[[torch.device], None]:
    return lambda device: matmul.test_qlora_fused(device, matmul.FUSED[index])


def _splits(device: torch.device) -> None:
    matmul.test_splits_share_the_sum(device, FP16, "absmax")


def _replay(device: torch.device) -> None:
    matmul.test_dropout_is_that_of_the_reference(device, 192)


CODECS = (
    TritonMutation(
        "swaps_nibbles",
        "tiles",
        "lookup_tile(codebook, packed >> 4), lookup_tile(codebook, packed & 15)",
        "lookup_tile(codebook, packed & 15), lookup_tile(codebook, packed >> 4)",
        _dequantize,
    ),
    TritonMutation(
        "forgets_the_offset_of_scales",
        "tiles",
        "lookup_tile(scale_codebook, codes) * per_scale + scale_offset",
        "lookup_tile(scale_codebook, codes) * per_scale",
        _dequantize,
    ),
    TritonMutation(
        "rounds_a_scale_once",
        "tiles",
        "lookup_tile(scale_codebook, codes) * per_scale + scale_offset",
        "(lookup_tile(scale_codebook, codes).to(tl.float64) * per_scale + scale_offset)"
        ".to(tl.float32)",
        codecs.test_dequantize_decodes_scales_with_two_roundings,
    ),
    TritonMutation(
        "takes_the_second_level_scale_of_the_first_block",
        "tiles",
        "index // SCALE_BLOCK_SIZE",
        "index // SCALE_BLOCK_SIZE * 0",
        codecs.test_dequantize_decodes_scales_with_two_roundings,
    ),
    TritonMutation(
        "decodes_with_a_neighbours_scale",
        "dequantize",
        "row * (cols // BLOCK_SIZE) + offs_block,",
        "row * (cols // BLOCK_SIZE) + offs_block // 2 * 2,",
        _dequantize,
    ),
    TritonMutation(
        "decodes_without_scales",
        "dequantize",
        "decode_pairs_tile(packed, codebook) * scales[:, None]",
        "decode_pairs_tile(packed, codebook)",
        _dequantize,
    ),
    TritonMutation(
        "writes_beside_a_row",
        "dequantize",
        "        mask=offs < cols,\n",
        "        mask=offs <= cols,\n",
        lambda device: codecs.test_dequantize_into_rows_that_are_apart(
            device, (64, 96), "absmax", FP32
        ),
    ),
    TritonMutation(
        "takes_a_columns_parity_for_an_elements",
        "dequantize",
        "tl.where(element % 2 == 0,",
        "tl.where(offs % 2 == 0,",
        lambda device: codecs.test_dequantize_into_rows_that_are_apart(
            device, (5, 33), "absmax", FP32
        ),
    ),
    TritonMutation(
        "decodes_many_with_the_first_table",
        "dequantize",
        "codebook_ptr = tl.where(here, codebook_ptrs[i], codebook_ptr)",
        "codebook_ptr = tl.where(here, codebook_ptr, codebook_ptr)",
        lambda device: many.test_weights_that_are_stored_differently(device, FP32),
    ),
    TritonMutation(
        "decodes_many_with_the_first_offset",
        "dequantize",
        "scale_offset_ptr = tl.where(here, scale_offset_ptrs[i], scale_offset_ptr)",
        "scale_offset_ptr = tl.where(here, scale_offset_ptr, scale_offset_ptr)",
        many.test_offsets_differ_between_weights,
    ),
    TritonMutation(
        "rounds_ties_up",
        "quantize",
        "tl.where(values > limit, step, 0)",
        "tl.where(values >= limit, step, 0)",
        lambda device: codecs.test_quantize_is_exact_on_and_around_boundaries(device, "nf4"),
    ),
    TritonMutation(
        "packs_the_odd_element_first",
        "quantize",
        "((high << 4) | low)",
        "((low << 4) | high)",
        _quantize,
    ),
    TritonMutation(
        "divides_instead_of_multiplying",
        "quantize",
        "values = weight * inverse[:, None]",
        "values = weight / divisor[:, None]",
        lambda device: codecs.test_quantize_is_exact_on_and_around_boundaries(device, "nf4"),
    ),
    TritonMutation(
        "takes_infinity_for_a_number",
        "quantize",
        "finite = largest < 0x7F800000",
        "finite = largest <= 0x7F800000",
        lambda device: codecs.test_quantize_of_special_blocks(device, FP32),
    ),
    TritonMutation(
        "loses_the_highest_digits_of_a_sum",
        "double_quantize",
        "for i in tl.static_range(DIGITS):",
        "for i in tl.static_range(DIGITS - 3):",
        codecs.test_double_quantize_sums_exactly,
    ),
    TritonMutation(
        "forgets_what_is_below_the_significand",
        "double_quantize",
        "(upper >> 2).to(tl.int64) | (sticky != 0).to(tl.int64)",
        "(upper >> 2).to(tl.int64)",
        codecs.test_double_quantize_rounds_the_sum_and_the_quotient_in_fp64,
    ),
    TritonMutation(
        "encodes_a_tie_upwards",
        "double_quantize",
        "tl.where(normalised <= limit, 0, step)",
        "tl.where(normalised < limit, 0, step)",
        codecs.test_double_quantize_is_exact_on_and_around_midpoints,
    ),
    TritonMutation(
        "gives_dropouts_words_to_the_wrong_elements",
        "dropout",
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
        lambda device: codecs.test_dropout_equals_reference(device, 0),
    ),
    TritonMutation(
        "does_not_scale_what_is_kept",
        "dropout",
        "tl.where(kept, tile * keep_scale, 0.0)",
        "tl.where(kept, tile, 0.0)",
        lambda device: codecs.test_dropout_equals_reference(device, 0),
    ),
    TritonMutation(
        "ignores_the_upper_half_of_a_counter",
        "dropout",
        "counter = first[:, None] // 4 + tl.arange(0, COLS // 4)[None, :]",
        "counter = first[:, None] * 0 + tl.arange(0, COLS // 4)[None, :]",
        lambda device: codecs.test_dropout_equals_reference(device, 0),
    ),
)

PRODUCTS = (
    TritonMutation(
        "decodes_a_words_bytes_in_the_wrong_order",
        "tiles",
        "tl.join(words >> 12, words >> 28)",
        "tl.join(words >> 28, words >> 12)",
        _fused(0),
    ),
    TritonMutation(
        "multiplies_one_token_with_its_neighbours_weight",
        "quantized_matmul",
        "tl.fma(w2, x2[None, :], fours)",
        "tl.fma(w2, x3[None, :], fours)",
        _fused(0),
    ),
    TritonMutation(
        "multiplies_with_the_scales_of_the_first_row",
        "quantized_matmul",
        "(row[:, None] * n_cols + offs_group[None, :]) // BLOCK_SIZE",
        "(row[:, None] * 0 + offs_group[None, :]) // BLOCK_SIZE",
        _fused(2),
    ),
    TritonMutation(
        "sums_two_blocks_before_one_scale",
        "quantized_matmul",
        "BLOCK_SIZE if BLOCK_SIZE < 32 else 32",
        "64",
        _fused(1),
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
        _fused(2),
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
        _fused(4),
    ),
    TritonMutation(
        "accumulates_in_the_narrow_type",
        "quantized_matmul",
        "acc = dot_tile(round_tile(weight, DTYPE), x.T, acc)",
        "acc = widen_tile(round_tile(dot_tile(round_tile(weight, DTYPE), x.T, acc), DTYPE))",
        lambda device: matmul.test_long_sums_are_not_rounded_on_their_way(device, BF16),
    ),
    TritonMutation(
        "multiplies_one_token_without_the_adapters_scaling",
        "quantized_matmul",
        "tl.sum(lora_b * xa[None, :], axis=1) * scaling",
        "tl.sum(lora_b * xa[None, :], axis=1)",
        _fused(1),
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
        "acc = dot_tile(round_tile(weight, DTYPE).T, grad_y.T, acc)",
        "acc = widen_tile(round_tile(dot_tile(round_tile(weight, DTYPE).T, grad_y.T, acc), DTYPE))",
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

MUTATIONS = (*CODECS, *PRODUCTS)
