"""Wrong codecs: quantize, double_quantize, dequantize."""

from __future__ import annotations

from tests.can_fail.mutation import Mutation

QUANTIZE = "tests/backends/test_cpu_quantize.py"
DOUBLE_QUANTIZE = "tests/backends/test_cpu_double_quantize.py"
DEQUANTIZE = "tests/backends/test_cpu_dequantize.py"

MUTATIONS = (
    Mutation(
        "quantize_swaps_nibbles",
        "quantize_avx512.cpp",
        "_mm512_set1_epi16(0x0110)",
        "_mm512_set1_epi16(0x1001)",
        f"{QUANTIZE}::test_quantize_takes_any_table",
        "avx512",
    ),
    Mutation(
        "quantize_swaps_nibbles_portably",
        "quantize.cpp",
        "static_cast<uint8_t>(high << 4 | low)",
        "static_cast<uint8_t>(low << 4 | high)",
        f"{QUANTIZE}::test_quantize_takes_any_table",
        "portable",
    ),
    Mutation(
        "quantize_sends_ties_up",
        "quantize_avx512.cpp",
        "_CMP_GT_OQ",
        "_CMP_GE_OQ",
        f"{QUANTIZE}::test_quantize_is_exact_on_and_around_boundaries",
        "avx512",
        count=4,
    ),
    Mutation(
        "quantize_sends_ties_up_in_avx2",
        "quantize_avx2.cpp",
        "_CMP_GT_OQ",
        "_CMP_GE_OQ",
        f"{QUANTIZE}::test_quantize_is_exact_on_and_around_boundaries",
        "avx2",
        count=4,
    ),
    Mutation(
        "quantize_drops_the_tail",
        "quantize.cpp",
        "if (full_blocks * p.block_size < p.numel) quantize_tail",
        "if (p.numel < 0) quantize_tail",
        f"{QUANTIZE}::test_quantize_equals_reference",
        "avx512",
    ),
    Mutation(
        "quantize_divides_by_denormals",
        "quantize.cpp",
        "1.0f / std::max(absmax, kSmallestNormal)",
        "1.0f / absmax",
        f"{QUANTIZE}::test_quantize_honours_denormals",
        "avx512",
    ),
    Mutation(
        "quantize_hides_infinities",
        "quantize.cpp",
        "return std::isfinite(value) ?",
        "return !std::isnan(value) ?",
        f"{QUANTIZE}::test_quantize_marks_only_the_block_that_is_not_finite",
        "avx512",
    ),
    Mutation(
        "quantize_rounds_a_decoded_limit_up",
        "quantize.cpp",
        "static_cast<double>(nearest) > x",
        "static_cast<double>(nearest) < x",
        f"{QUANTIZE}::test_quantize_against_decoded_scales_is_exact_around_the_limits",
        "portable",
    ),
    Mutation(
        "quantize_ignores_the_sign_of_a_decoded_scale",
        "quantize.cpp",
        "std::copysign(1.0f, scale)",
        "1.0f",
        f"{QUANTIZE}::test_quantize_against_decoded_scales_breaks_exact_ties_downwards",
        "portable",
    ),
    Mutation(
        "double_quantize_sends_ties_up",
        "double_quantize_x86.cpp",
        "_CMP_NGE_UQ",
        "_CMP_NGT_UQ",
        f"{DOUBLE_QUANTIZE}::test_double_quantize_is_exact_on_and_around_midpoints",
        "avx512",
        count=3,
    ),
    Mutation(
        "double_quantize_sums_in_plain_fp64",
        "double_quantize.cpp",
        "low += (high - (sum - shifted)) + (value - shifted);",
        "",
        f"{DOUBLE_QUANTIZE}::test_double_quantize_sums_exactly",
        "avx2",
    ),
    Mutation(
        "dequantize_fuses_the_scale_decode",
        "dequantize_avx512.cpp",
        "_mm512_add_ps(_mm512_mul_ps(value, scale), offset)",
        "_mm512_fmadd_ps(value, scale, offset)",
        f"{DEQUANTIZE}::test_dequantize_decodes_scales_with_two_roundings",
        "avx512",
    ),
    Mutation(
        "dequantize_takes_the_neighbours_scale",
        "dequantize.cpp",
        "decode_scales(weight.scales, block, std::max",
        "decode_scales(weight.scales, block / 2 * 2, std::max",
        f"{DEQUANTIZE}::test_dequantize_into_rows_that_are_apart",
        "avx2",
    ),
    Mutation(
        "dequantize_ignores_the_row_stride",
        "dequantize.cpp",
        "out + r * p.row_stride * decoder.element_bytes",
        "out + r * weight.cols * decoder.element_bytes",
        f"{DEQUANTIZE}::test_dequantize_into_rows_that_are_apart",
        "avx512",
    ),
    Mutation(
        "dequantize_flushes_denormals",
        "dequantize_avx512_bf16.cpp",
        "return 0x1p-125f / smallest;",
        "return 0.0f;",
        f"{DEQUANTIZE}::test_dequantize_of_every_byte_and_edge_scale",
        "avx512_bf16",
    ),
    Mutation(
        "dequantize_rounds_ties_up",
        "dequantize_avx512.cpp",
        "_mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))",
        "_mm512_set1_epi32(0x8000)",
        f"{DEQUANTIZE}::test_dequantize_rounds_to_nearest_even",
        "avx512",
        header="include/qlk/simd_avx512.h",
    ),
)
