"""How the CUDA backward comes by the adapter's gradients: its own kernels, or torch's GEMMs.

Pure functions of sizes, dtypes and device facts, tested without a GPU. The numbers follow from
arithmetic on compiled code; none of them has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Path = Literal["kernel", "gemm"]

HALVES = (torch.float16, torch.bfloat16)
# A longer sum in fp32 would begin to lose what a sum of partial sums keeps.
_MOST_SLICE_TOKENS = 2048
# A slice fills its pipeline in two tiles; with fewer than four most of it would be waiting.
_LEAST_SLICE_TOKENS = 64
# Time of a pass over data that lies in L2, in passes over memory: 4.3 to 5.5 TB/s on an H200. All
# chunks of ranks after the first find the data there.
_L2_PASS = 0.78
_LARGEST = 2**31 - 1
# Ranks that a block takes in one pass over the data (qlk/cuda/launch.h).
MOST_RANKS = 64


class GradientSizes(NamedTuple):
    """dataᵀ left of data [M,C], left [M,R]; with_u: and data · lora_b [C,R] in the same pass, or
    that alone."""

    tokens: int
    cols: int
    rank: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    with_u: bool
    with_gradient: bool = True


class GradientCosts(NamedTuple):
    """Estimated times, in the time of one read of `data` from memory."""

    kernel: float
    gemm: float


def rank_chunks(rank: int) -> int:
    """Blocks that share the data, each with up to 64 ranks."""
    return -(-rank // MOST_RANKS)


def column_tiles(sizes: GradientSizes) -> int:
    """Tiles of columns; of many ranks a block takes fewer (qlk/cuda/launch.h)."""
    both = sizes.with_u and sizes.with_gradient
    return -(-sizes.cols // (256 if both and sizes.rank > 32 else 512))


def choose_token_slices(sizes: GradientSizes, sm_count: int) -> int:
    """Slices of the tokens: a block for every multiprocessor (two would double the partial sums,
    and one has two tiles of 16 KB on their way), each long enough to fill its pipeline, none so
    long that its sum loses accuracy."""
    blocks = column_tiles(sizes) * rank_chunks(sizes.rank)
    filling = max(1, min(sm_count // max(blocks, 1), sizes.tokens // _LEAST_SLICE_TOKENS))
    return max(filling, -(-sizes.tokens // _MOST_SLICE_TOKENS))


def gradient_costs(sizes: GradientSizes, sm_count: int) -> GradientCosts:
    """What both ways cost. fp32 partial sums are written to L2 once and read once; the GEMMs read
    the data for each of their products and are assumed to be limited by that."""
    # Partial sums against data: 8 R C bytes of every slice, 8 R M of every tile of columns, to
    # 2 M C bytes.
    partials = 0.0
    if sizes.with_gradient:
        partials += 4 * sizes.rank * choose_token_slices(sizes, sm_count) / sizes.tokens
    if sizes.with_u:
        partials += 4 * sizes.rank * column_tiles(sizes) / sizes.cols
    kernel = max(1.0, _L2_PASS * rank_chunks(sizes.rank)) + _L2_PASS * partials
    return GradientCosts(kernel, 2.0 if sizes.with_u else 1.0)


def why_no_kernel(sizes: GradientSizes) -> str | None:
    """Why the kernels cannot take a problem, or None."""
    if sizes.dtype not in HALVES:
        # FFMA products make both ways equally long, and a GEMM's fp32 result is not rounded.
        return f"dtype must be float16 or bfloat16, got {str(sizes.dtype).removeprefix('torch.')}"
    if min(sizes.tokens, sizes.cols, sizes.rank) == 0:
        return "the product is empty"
    if max(sizes.tokens, sizes.cols) * sizes.rank > _LARGEST:
        return "gradients must have fewer than 2^31 elements"
    return None


def choose_gradient_path(sizes: GradientSizes, sm_count: int) -> Path:
    """The cheaper way; always the kernels for adapters of another dtype than the data, since a GEMM
    would round the gradient to the data's dtype on the way."""
    if why_no_kernel(sizes):
        return "gemm"
    if sizes.adapter_dtype != sizes.dtype:
        return "kernel"
    costs = gradient_costs(sizes, sm_count)
    return "kernel" if costs.kernel < costs.gemm else "gemm"


def projects_while_copying(sizes: GradientSizes) -> bool:
    """Whether the forward's xa = x · lora_aᵀ and the copy of x beside it cost less in one pass of
    the kernel than by a GEMM and a copy, which read x twice."""
    assert not sizes.with_gradient
    # Slices of the tokens leave no partial sums of xa: their number does not matter.
    return not why_no_kernel(sizes) and gradient_costs(sizes, 1).kernel < 2.0


def describe(sizes: GradientSizes, sm_count: int) -> str:
    """A line with the choice and what it follows from."""
    adapter, dtype = (str(d).removeprefix("torch.") for d in (sizes.adapter_dtype, sizes.dtype))
    what = "{u, grad_b}" if sizes.with_u else "grad_a"
    problem = f"{what} M={sizes.tokens} C={sizes.cols} R={sizes.rank}, {adapter} over {dtype}"
    reason = why_no_kernel(sizes)
    if reason:
        return f"{problem}: gemm ({reason})"
    costs = gradient_costs(sizes, sm_count)
    return (
        f"{problem}: {choose_gradient_path(sizes, sm_count)}"
        f" (kernel {costs.kernel:.2f}, gemm {costs.gemm:.2f} passes,"
        f" {choose_token_slices(sizes, sm_count)} token slices)"
    )
