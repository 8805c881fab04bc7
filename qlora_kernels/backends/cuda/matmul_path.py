"""How the CUDA matmuls go about a problem: a fused kernel, or Ŵ in scratch and cuBLAS.

Pure functions of sizes, dtype and device facts, tested without a GPU. The numbers follow from
arithmetic on compiled code; none of them has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from qlora_kernels.backends.cuda.common import LEAST_BLOCK_SIZE
from qlora_kernels.backends.registry import Problem

Path = Literal["fused", "wgmma", "dense"]

# The fused kernel goes over the weight once for every 32 tokens (qlk/cuda/launch.h). In bytes of an
# element with fp32 scales for 64: a pass reads 0.56, and later passes find most of that in L2;
# decoding to scratch reads 0.56 and writes 2, which the GEMM reads again. So up to eight passes,
# 256 tokens, move no more, and a pass's three instructions an element keep up with reading it.
# Half of that is taken until it is measured: from 184 tokens on an H200's GEMM is limited by its
# products, and mma.sync reaches 0.6 of cuBLAS there. For that reason no tiles of more tokens are
# built on mma.sync: at M = 512 they would have to reach 0.66 of cuBLAS to win.
FUSED_TOKENS = 128
# Hopper's own kernel decodes a weight once for up to 128 tokens, and its products are wgmma's. It
# takes over above 16 tokens: up to there one pass of the kernel above reads the weight as fast, and
# without a launch that arranges x. Decoding to scratch first costs 235 / M of the GEMM (2.56 bytes
# of an element written and read once more), 46 % at 512 tokens: the kernel has to reach 0.66 of
# cuBLAS there, and 0.8 at 1024. Its tiles of 256 rows and 128 tokens move as many bytes from L2 as
# an H200 can while they multiply, and issue 60 % of the instructions that it can: 0.8 and more, if
# nothing else is in the way. So it ends where that leaves a margin.
WGMMA_TOKENS, _WGMMA_CAPABILITY = 512, 90
FUSED_DTYPES = (torch.float16, torch.bfloat16)
TILE_N = 128
# A block's part of K is at least this long: filling its pipeline and its table takes about as long.
_LEAST_SPLIT_K = 512
_BLOCKS_PER_SM = 2
_MOST_SPLITS = 16
# qlk/cuda/launch.h: kFusedLargest, kFusedMostElements and kFusedMostRows.
_LARGEST, _MOST_ELEMENTS, _MOST_ROWS = 2**30, 2**37, 65_535 * TILE_N


class MatmulSizes(NamedTuple):
    """What the choice depends on: a product of M tokens with a weight [N,K]."""

    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    block_size: int
    batch_invariant: bool = False
    capability: int = 0  # of the GPU, times ten


def why_not_fused(sizes: MatmulSizes) -> str | None:
    """Why the fused kernel cannot take a problem at all, or None."""
    if sizes.dtype not in FUSED_DTYPES:
        return f"dtype must be float16 or bfloat16, got {str(sizes.dtype).removeprefix('torch.')}"
    if sizes.in_features % 64 or sizes.in_features == 0:
        return f"in_features must be a multiple of 64, got {sizes.in_features}"
    if sizes.block_size < 64:
        return f"block_size must be at least 64, got {sizes.block_size}"
    if max(sizes.tokens, sizes.in_features) > _LARGEST:
        largest = max(sizes.tokens, sizes.in_features)
        return f"tokens and in_features must be at most 2^30, got {largest}"
    if sizes.out_features > _MOST_ROWS:
        return f"out_features must be at most {_MOST_ROWS}, got {sizes.out_features}"
    if sizes.out_features * sizes.in_features > _MOST_ELEMENTS:
        return f"a weight must have at most 2^37 elements, got {sizes.out_features} rows"
    return None


def why_not_wgmma(sizes: MatmulSizes) -> str | None:
    """Why Hopper's kernel does not take a problem that a fused kernel can, or None."""
    if sizes.capability != _WGMMA_CAPABILITY:
        return f"the GPU must be sm_90, got sm_{sizes.capability}"
    if sizes.batch_invariant:
        return "batch_invariant: its sums depend on the number of tokens"
    if not 16 < sizes.tokens <= WGMMA_TOKENS:
        return f"tokens must be in 17 ... {WGMMA_TOKENS}, got {sizes.tokens}"
    return None


def why_dense(sizes: MatmulSizes) -> str | None:
    """Why the fused kernel, which could, does not take a problem, or None."""
    if sizes.batch_invariant or sizes.tokens <= FUSED_TOKENS:
        return None
    return f"tokens must be at most {FUSED_TOKENS}, got {sizes.tokens}"


def choose_path(sizes: MatmulSizes) -> Path:
    """ "fused", "wgmma": weights decoded in the product, the second on Hopper alone. "dense": Ŵ
    decoded to scratch, then cuBLAS."""
    if why_not_fused(sizes):
        return "dense"
    if why_not_wgmma(sizes) is None:
        return "wgmma"
    return "dense" if why_dense(sizes) else "fused"


def fused_tile_tokens(tokens: int) -> int:
    """Tokens of a tile of the fused kernel: qlk/cuda/launch.h, fused_matmul_tokens."""
    return next((tile for tile in (8, 16) if tokens <= tile), 32)


def choose_splits(out_features: int, in_features: int, sm_count: int) -> int:
    """Blocks of the fused kernel that share an output tile. Does not look at M: a token's bits may
    not depend on how many others there are."""
    row_tiles = -(-out_features // TILE_N)
    wanted = _BLOCKS_PER_SM * sm_count // max(row_tiles, 1)
    return max(1, min(wanted, in_features // _LEAST_SPLIT_K, _MOST_SPLITS))


def matmul_rejects(problem: Problem) -> str | None:
    """Why the CUDA matmuls cannot run a problem: batch invariance needs the fused kernel."""
    if problem.device_type != "cuda":
        return f"device must be cuda, got {problem.device_type}"
    if problem.dtype not in (*FUSED_DTYPES, torch.float32):
        got = str(problem.dtype).removeprefix("torch.")
        return f"dtype must be one of float32, float16, bfloat16, got {got}"
    if problem.block_size < LEAST_BLOCK_SIZE:
        return f"block_size must be at least {LEAST_BLOCK_SIZE}, got {problem.block_size}"
    if not problem.batch_invariant:
        return None
    sizes = MatmulSizes(
        problem.tokens,
        problem.out_features,
        problem.in_features,
        problem.dtype,
        problem.block_size,
        True,
    )
    reason = why_not_fused(sizes)
    return reason and f"batch_invariant: {reason}"
