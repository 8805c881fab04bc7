"""Wrong codecs in Triton, each with the test that must catch it."""

from __future__ import annotations

import torch

from tests.can_fail.triton_mutation import FP32, TritonMutation
from tests.triton.interpreter import test_codecs as codecs
from tests.triton.interpreter import test_dequantize_many as many


def _dequantize(device: torch.device) -> None:
    codecs.test_dequantize_equals_reference(device, 64, "nested", FP32)


def _quantize(device: torch.device) -> None:
    codecs.test_quantize_equals_reference(device, 64, FP32)


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
