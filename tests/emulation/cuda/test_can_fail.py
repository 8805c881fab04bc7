"""The emulated tests can fail: each fault put into a copy of csrc turns a named check red, in the
mode that is there to see it. The same checks pass on the kernels as they are (test_codecs.py,
test_matmuls.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cuda_codec_checks, cuda_gradients, cuda_matmuls
from tests.emulation.cuda.mutation import Mutation, assert_turns_red

CHECKS = {**cuda_codec_checks.CHECKS, **cuda_matmuls.CHECKS, **cuda_gradients.CHECKS}


MATMUL = "kernels/quantized_matmul_sm80.cu"
EPILOGUE = "kernels/quantized_matmul_epilogue.cuh"
GRADIENT = "kernels/low_rank_gradients_sm80.cu"
GRADIENT_BARRIER = "    __syncthreads();\n    if constexpr (kWithGradient)"
LOOP_BARRIER = "        __syncthreads();\n        const int next"

MUTATIONS = (
    Mutation(
        "quantize_swaps_nibbles",
        "kernels/quantize.cu",
        (("code << (4 * (i ^ 1))", "code << (4 * i)"),),
        "quantize_tables",
    ),
    Mutation(
        "quantize_sends_ties_up",
        "kernels/quantize.cu",
        (("n > boundary ? 4 : 0", "n >= boundary ? 4 : 0"),),
        "quantize_tables",
    ),
    Mutation(
        "quantize_pads_with_the_code_of_zero_weights",
        "kernels/quantize.cu",
        (("if (count % 2) {", "if (count < 0) {"),),
        "quantize_tables",
    ),
    Mutation(
        "quantize_reads_past_the_end",
        "kernels/quantize.cu",
        (("if (vector && first + kVector <= p.numel)", "if (vector && first < p.numel)"),),
        "quantize_sizes",
        "memory",
    ),
    Mutation(
        "quantize_encodes_before_the_table_is_there",
        "kernels/quantize.cu",
        (("  __syncthreads();\n  const Encoder", "  const Encoder"),),
        "quantize_block_sizes",
        "races",
    ),
    Mutation(
        "double_quantize_forgets_what_is_below",
        "kernels/double_quantize.cu",
        (("sticky = rest != 0", "sticky = false"),),
        "double_quantize_sums_exactly",
    ),
    Mutation(
        "double_quantize_reuses_the_warps_maxima_too_early",
        "kernels/double_quantize.cu",
        (("  __syncthreads();\n  return value;", "  return value;"),),
        "double_quantize",
        "races",
    ),
    Mutation(
        "dequantize_swaps_nibbles",
        "kernels/dequantize.cu",
        (("words[u] >> (4 * (i ^ 1))", "words[u] >> (4 * i)"),),
        "dequantize_every_byte",
    ),
    Mutation(
        "dequantize_takes_the_neighbours_scale",
        "kernels/dequantize.cu",
        (("first >> m.block_shift,", "(first >> m.block_shift) / 2 * 2,"),),
        "dequantize_layouts",
    ),
    Mutation(
        "dequantize_fuses_the_scale_decode",
        "include/qlk/cuda/scales.cuh",
        (
            (
                "__fadd_rn(__fmul_rn(map[view.scale_codes[block]], group_absmax(block)), offset)",
                "__fmaf_rn(map[view.scale_codes[block]], group_absmax(block), offset)",
            ),
        ),
        "dequantize_scales",
    ),
    Mutation(
        "dequantize_overwrites_tables_in_use",
        "kernels/dequantize.cu",
        (("      __syncthreads();  // Everyone is done with the last weight's tables.\n", ""),),
        "dequantize_many_at_once",
        "races",
    ),
    Mutation(
        "matmul_swaps_nibbles",
        MATMUL,
        (("threadIdx.x >> 4]", "threadIdx.x & 0xf]"), ("threadIdx.x & 15]", "threadIdx.x >> 4]")),
        "every_place",
    ),
    Mutation(
        "matmul_takes_the_scale_of_the_first_chunk",
        MATMUL,
        (("k0 / kChunk + chunk;", "k0 / kChunk;"),),
        "every_place",
    ),
    Mutation(
        "matmul_copies_codes_over_the_table",
        MATMUL,
        (("kEntryBytes + kGap + row", "kEntryBytes + row"),),
        "every_place",
    ),
    Mutation(
        "matmul_reads_scales_past_the_last",
        MATMUL,
        (("if (scale_left > step * kTileK)", "if (scale_left > (step - 1) * kTileK)"),),
        "shapes",
        "memory",
    ),
    Mutation(
        "matmul_goes_round_the_first_tiles",
        MATMUL,
        (("    sources.advance(kStages);\n", ""),),
        "shapes",
    ),
    Mutation(
        "matmul_reads_xa_as_if_it_stood_alone",
        EPILOGUE,
        (("p.tokens, p.xa_stride,", "p.tokens, p.rank,"),),
        "adapters",
    ),
    Mutation(
        "matmul_does_not_wait",
        MATMUL,
        (("        ptx::wait_copies<kStages - 2>();\n", ""),),
        "shapes",
    ),
    Mutation(
        "matmul_waits_for_a_group_too_few",
        MATMUL,
        (("wait_copies<kStages - 2>", "wait_copies<kStages - 1>"),),
        "shapes",
    ),
    Mutation(
        "matmul_has_no_barrier",
        MATMUL,
        ((LOOP_BARRIER, "        const int next"),),
        "shapes",
        "races",
    ),
    Mutation(
        "matmul_refills_before_the_barrier",
        MATMUL,
        (
            (LOOP_BARRIER, "        const int next"),
            (
                "        ptx::commit_copies();\n        float scale",
                "        ptx::commit_copies();\n        __syncthreads();\n        float scale",
            ),
        ),
        "splits",
        "races",
    ),
    Mutation(
        "matmul_leaves_its_tickets",
        EPILOGUE,
        (("if (threadIdx.x == 0) p.tickets[tile_index] = 0;", ""),),
        "splits",
    ),
    Mutation(
        "matmul_forgets_the_first_split",
        EPILOGUE,
        (("for (int split = 1; split < p.splits", "for (int split = 2; split < p.splits"),),
        "splits",
    ),
    Mutation(
        "matmul_does_not_wait_for_the_projection",
        MATMUL,
        (("  ptx::wait_for_primary();\n", ""),),
        "projections_launched_ahead",
    ),
    Mutation(
        "matmul_adds_the_adapter_before_the_projection_is_there",
        MATMUL,
        (
            ("  ptx::wait_for_primary();\n", ""),
            ("  store_tile<kDType", "  ptx::wait_for_primary();\n  store_tile<kDType"),
        ),
        "projections_launched_ahead",
    ),
    Mutation(
        "projection_is_launched_to_overlap_what_wrote_x",
        "kernels/low_rank.cu",
        (
            (
                "return launch(down_projection_kernel<DType::kBFloat16>",
                "return launch_overlapping(down_projection_kernel<DType::kBFloat16>",
            ),
        ),
        "projections_launched_ahead",
    ),
    Mutation(
        "down_projection_sums_before_all_are_there",
        "kernels/low_rank.cu",
        (("  __syncthreads();\n", ""),),
        "batch_invariance",
        "races",
    ),
    Mutation(
        "gradient_takes_the_rows_of_a_tile_untransposed",
        GRADIENT,
        (
            (
                "lane % 8 + lane / 16 * 8, column = step * 16 + lane / 8 % 2 * 8",
                "lane % 16, column = step * 16 + lane / 16 * 8",
            ),
        ),
        "gradient_sizes",
    ),
    Mutation(
        "gradient_does_not_wait",
        GRADIENT,
        (("    ptx::wait_copies<kStages - 2>();\n", ""),),
        "gradient_pipeline",
    ),
    Mutation(
        "gradient_waits_for_a_group_too_few",
        GRADIENT,
        (("wait_copies<kStages - 2>", "wait_copies<kStages - 1>"),),
        "gradient_pipeline",
    ),
    Mutation(
        "gradient_has_no_barrier",
        GRADIENT,
        ((GRADIENT_BARRIER, "    if constexpr (kWithGradient)"),),
        "gradient_pipeline",
        "races",
    ),
    Mutation(
        "gradient_refills_before_the_barrier",
        GRADIENT,
        (
            (GRADIENT_BARRIER, "    if constexpr (kWithGradient)"),
            (
                "    const unsigned char* const here =",
                "    __syncthreads();\n    const unsigned char* const here =",
            ),
        ),
        "gradient_pipeline",
        "races",
    ),
    Mutation(
        "gradient_keeps_one_tile_of_left",
        GRADIENT,
        (
            ("left_part.store(left + (parity ^ 1) * Shape::kLeftBytes)", "left_part.store(left)"),
            ("left + parity * Shape::kLeftBytes", "left"),
        ),
        "gradient_pipeline",
        "races",
    ),
    Mutation(
        "gradient_forgets_the_last_tiles_u",
        GRADIENT,
        (("    if (first < last)\n", "    if (first + 1 < last)\n"),),
        "gradient_and_u",
    ),
    Mutation(
        "gradient_of_many_ranks_sums_u_before_all_are_there",
        GRADIENT,
        (("      __syncthreads();\n      store_u", "      store_u"),),
        "gradient_ranks",
        "races",
    ),
    Mutation(
        "gradient_of_many_ranks_takes_the_columns_of_few",
        "include/qlk/cuda/launch.h",
        (("ranks == 64 && both ? 256 : 512;", "ranks == 64 && !both ? 256 : 512;"),),
        "gradient_ranks",
    ),
    Mutation(
        "gradient_sums_u_before_all_are_there",
        GRADIENT,
        (("    __syncthreads();\n    if (first < last)", "    if (first < last)"),),
        "gradient_and_u",
        "races",
    ),
    Mutation(
        "gradient_adds_the_sums_of_warps_without_columns",
        GRADIENT,
        (("if (other < warps) sum", "if (other <= warps) sum"),),
        "gradient_and_u",
    ),
    Mutation(
        "gradient_gives_every_chunk_the_first_ranks",
        GRADIENT,
        (("% launch.rank_chunks * kRanks;", "% launch.rank_chunks * 0;"),),
        "gradient_ranks",
    ),
    Mutation(
        "gradient_reads_past_the_columns",
        GRADIENT,
        (("inside && column + j < p.cols ?", "inside ?"),),
        "gradient_sizes",
        "memory",
    ),
    Mutation(
        "projection_reads_its_adapter_transposed",
        GRADIENT,
        (("p.right_rank_major ? rank * p.cols", "!p.right_rank_major ? rank * p.cols"),),
        "projection",
    ),
    Mutation(
        "gradient_copies_a_row_too_far",
        GRADIENT,
        (("    if (token0 + row < p.tokens && column < p.cols)\n", "    if (column < p.cols)\n"),),
        "gradient_copy",
        "memory",
    ),
    Mutation(
        "partial_sums_forget_the_last",
        "kernels/partial_sums.cu",
        (("part < job.parts;", "part + 1 < job.parts;"),),
        "partial_sums",
    ),
    Mutation(
        "partial_sums_round_before_scaling",
        "kernels/partial_sums.cu",
        (
            (
                "__fmul_rn(job.scaling, sum)",
                "__fmul_rn(job.scaling, ptx::f16_to_float(Element<DType::kFloat16>::store(sum)))",
            ),
        ),
        "partial_sums",
    ),
    Mutation(
        "dropout_scales_what_it_drops",
        "kernels/dropout.cu",
        (("words[i] >= p.threshold", "words[i] > p.threshold / 2"),),
        "dropout",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_wrong_kernel_turns_a_check_red(mutation: Mutation, tmp_path: Path) -> None:
    assert_turns_red(mutation, CHECKS, tmp_path)
