"""As test_can_fail.py, for the Hopper matmul: the checks pass on the kernel as it is
(test_wgmma.py), and each fault turns one red."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import cuda_wgmma
from tests.emulation.cuda.mutation import Mutation, assert_turns_red

MATMUL = "kernels/quantized_matmul_sm90.cu"
PARTS = "kernels/quantized_matmul_sm90.cuh"
ARRANGE = "kernels/arrange_tokens.cuh"
X_WAIT = "ptx::mbarrier_wait(barriers.x_full + x.stage(), x.parity());\n"
RELEASE_X = """            if (unit == kUnits - 1 && p == kParts - 1) {
              release(barriers.x_empty + x.stage());
              ++x.count;
            }
"""
WAIT = "            ptx::wgmma_wait<0>(part);\n"
CODES_WAIT = "    ptx::mbarrier_wait(barriers.codes_empty + at.stage(), at.parity() ^ 1);\n"
SCALES_ARRIVE = "      if (lane == 0) ptx::mbarrier_arrive(barriers.codes_full"
OWN_FIRST = "first + (block + int(blockIdx.x) - 2 * first) % (last - first + 1)"

# The tiles that the check takes, and one dtype.
SWITCH = """  switch (call.tile_tokens) {
    case 32:
      return tall ? launch_for<kDType, 32, 2>(call, stream)
                  : launch_for<kDType, 32, 1>(call, stream);
    case 64:
      return tall ? launch_for<kDType, 64, 2>(call, stream)
                  : launch_for<kDType, 64, 1>(call, stream);
    default:
      return tall ? launch_for<kDType, 128, 2>(call, stream)
                  : launch_for<kDType, 128, 1>(call, stream);
  }
"""
TILES = {
    "wgmma_every_place": "  return launch_for<kDType, 128, 1>(call, stream);\n",
    "wgmma_shared_tiles": """  if (tall) return launch_for<kDType, 64, 2>(call, stream);
  return launch_for<kDType, 32, 1>(call, stream);
""",
}
OTHER_DTYPE = {"wgmma_every_place": "kFloat16", "wgmma_shared_tiles": "kBFloat16"}

MUTATIONS = (
    Mutation(
        "swaps_nibbles",
        MATMUL,
        (("codebook[thread >> 4]", "codebook[thread & 0xf]"), ("thread & 15]", "thread >> 4]")),
        "wgmma_every_place",
    ),
    Mutation(
        "multiplies_x_in_its_own_order",
        ARRANGE,
        (("row[8 * q + piece]", "row[4 * piece + q]"),),
        "wgmma_every_place",
    ),
    Mutation(
        "forgets_the_swizzle",
        ARRANGE,
        (("out + (piece ^ static_cast<int>(token % 8))", "out + piece"),),
        "wgmma_every_place",
    ),
    Mutation(
        "takes_the_even_rows_scale_for_both",
        MATMUL,
        (("? scale.x : scale.y", "? scale.x : scale.x"),),
        "wgmma_every_place",
    ),
    Mutation(
        "takes_the_scale_of_the_first_chunk",
        MATMUL,
        (("(scales + chunk * Shape::kRows +", "(scales +"),),
        "wgmma_every_place",
    ),
    Mutation(
        "multiplies_before_x_is_there",
        MATMUL,
        (
            (
                "        " + X_WAIT + "        const uint64_t right = x_tiles",
                "        const uint64_t right = x_tiles",
            ),
        ),
        "wgmma_shared_tiles",
    ),
    Mutation(
        "announces_too_few_bytes",
        PARTS,
        (
            (
                "barriers.x_full + at.stage(), Shape::kXBytes);\n      ptx::copy",
                "barriers.x_full + at.stage(), Shape::kXBytes / 2);\n      ptx::copy",
            ),
        ),
        "wgmma_every_place",
    ),
    Mutation(
        "reads_sums_under_way",
        MATMUL,
        ((WAIT + "            if", "            if"),),
        "wgmma_every_place",
    ),
    Mutation(
        "hands_x_back_too_early",
        MATMUL,
        ((WAIT + RELEASE_X, RELEASE_X + WAIT),),
        "wgmma_shared_tiles",
    ),
    Mutation(
        "overwrites_codes_in_use",
        PARTS,
        ((CODES_WAIT + "    ptx", "    ptx"),),
        "wgmma_shared_tiles",
    ),
    Mutation(
        "does_not_wait_for_x_to_be_arranged",
        PARTS,
        (("  ptx::wait_for_primary();\n", ""),),
        "wgmma_every_place",
    ),
    Mutation(
        "counts_scales_before_all_are_there",
        PARTS,
        (("      __syncwarp();\n" + SCALES_ARRIVE, SCALES_ARRIVE),),
        "wgmma_shared_tiles",
        "races",
    ),
    Mutation(
        "adds_its_own_sums_first",
        PARTS,
        (("place(block);\n#pragma", f"place({OWN_FIRST});\n#pragma"),),
        "wgmma_shared_tiles",
    ),
    Mutation(
        "leaves_its_tickets",
        PARTS,
        (("  if (thread == 0) *tickets = 0;\n", ""),),
        "wgmma_shared_tiles",
    ),
    Mutation(
        "reads_the_ticket_before_it_is_drawn",
        PARTS,
        (
            (
                "atomicAdd(tickets, 1u);\n  ptx::named_barrier_sync(1 + group, kGroupThreads);\n",
                "atomicAdd(tickets, 1u);\n",
            ),
        ),
        "wgmma_shared_tiles",
        "races",
    ),
    Mutation(
        "stores_a_row_too_far",
        PARTS,
        (("if (both) to[1]", "to[1]"),),
        "wgmma_shared_tiles",
    ),
    Mutation(
        "reads_scales_past_the_last",
        PARTS,
        (("row < launch.rows && chunk < launch.chunks", "chunk < launch.chunks"),),
        "wgmma_shared_tiles",
        "memory",
    ),
    Mutation(
        "scales_the_adapter_by_one",
        MATMUL,
        (("__fmaf_rn(p.scaling, part[i], to[i])", "__fadd_rn(part[i], to[i])"),),
        "wgmma_adapters",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_wrong_kernel_turns_a_check_red(mutation: Mutation, tmp_path: Path) -> None:
    if mutation.check in TILES:
        other = f"launch_for_tile<DType::{OTHER_DTYPE[mutation.check]}>(call, on)"
        fewer = ((MATMUL, other, "cudaErrorInvalidValue"), (MATMUL, SWITCH, TILES[mutation.check]))
        mutation = replace(mutation, also=fewer)
    assert_turns_red(mutation, cuda_wgmma.CHECKS, tmp_path)
