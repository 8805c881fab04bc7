"""The fused matmul of Hopper for tens to hundreds of tokens: csrc/kernels/quantized_matmul_sm90.cu,
and which of its tiles a problem takes.

The choice is arithmetic on the compiled code and on what an H200 moves; none of it has been timed
on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlora_kernels.backends.cuda.common import contiguous, current_stream, weight_arguments
from qlora_kernels.backends.cuda.low_rank import Projection, run_projection
from qlora_kernels.backends.cuda.scratch import tickets
from qlora_kernels.formats.quantized_weight import WeightOperands

# Rows of the weight and tokens: qlk/cuda/launch_sm90.h, wgmma_matmul_runs.
TILES = tuple((rows, tokens) for rows in (128, 256) for tokens in (32, 64, 128))
TILE_K = 256
# Filling a block's pipeline and its table takes about as long as these of its steps.
_LEAST_STEPS = 2
# Per clock of a multiprocessor: products of its tensor cores; bytes from L2, 5.5 TB/s shared by an
# H200's; bytes of partial sums, which go to L2 and come from there at once.
_PRODUCTS, _L2_BYTES, _SUM_BYTES = 2048, 24, 32
# A kernel less to launch than a GEMM with split sums, while it is short.
_KERNEL_TOKENS = 32


class WgmmaTile(NamedTuple):
    """A launch: a block's tile of y, and the blocks that share the work of all tiles."""

    rows: int
    tokens: int
    blocks: int


def work_steps(tokens: int, out_features: int, in_features: int, tile: tuple[int, int]) -> int:
    """Steps of `TILE_K` columns in all tiles."""
    return -(-tokens // tile[1]) * -(-out_features // tile[0]) * -(-in_features // TILE_K)


def estimated_clocks(
    tokens: int, out_features: int, in_features: int, tile: tuple[int, int], blocks: int
) -> float:
    """Clocks of the longest block: its steps, each as long as its products or its bytes take, and
    the sums of tiles that several blocks share."""
    rows, columns = tile
    steps = -(-work_steps(tokens, out_features, in_features, tile) // blocks)
    # 144 bytes of a row's codes and scales, two for each column of a token.
    moved = rows * (TILE_K // 2 + 16) + columns * TILE_K * 2
    clocks = steps * max(rows * columns * TILE_K / _PRODUCTS, moved / _L2_BYTES)
    of_tile = -(-in_features // TILE_K)
    if steps % of_tile == 0:
        return clocks
    # A block leaves its sums behind; the last one of a tile reads those of all.
    sharing = -(-of_tile // steps) + 1
    return clocks + (1 + sharing) * rows * columns * 4 / _SUM_BYTES


def choose_wgmma_tile(tokens: int, out_features: int, in_features: int, sm_count: int) -> WgmmaTile:
    """The launch with the fewest estimated clocks, a pure function of sizes: results repeat bit for
    bit. It looks at M, as no batch-invariant product comes here (matmul_path.py)."""
    candidates = []
    for tile in TILES:
        if tile[1] > 32 and tile[1] // 2 >= tokens:
            continue
        steps = work_steps(tokens, out_features, in_features, tile)
        whole_tiles = steps // -(-in_features // TILE_K)
        for blocks in {min(sm_count, max(1, steps // _LEAST_STEPS)), min(sm_count, whole_tiles)}:
            clocks = estimated_clocks(tokens, out_features, in_features, tile, blocks)
            candidates.append((clocks, WgmmaTile(*tile, blocks)))
    return min(candidates)[1]


class WgmmaScratch(NamedTuple):
    """Elements of a launch's scratch; see qlk/cuda/launch_sm90.h."""

    arranged: int  # of x's dtype
    partials: int  # fp32
    tickets: int  # zeros, before and after


def scratch_sizes(
    tokens: int, out_features: int, in_features: int, rank: int, tile: WgmmaTile
) -> WgmmaScratch:
    """What a launch needs; with one block no tile is shared, but its pointers are given."""
    token_tiles, row_tiles = -(-tokens // tile.tokens), -(-out_features // tile.rows)
    chunks = in_features // 64 + -(-rank // 64)
    return WgmmaScratch(
        chunks * token_tiles * tile.tokens * 64,
        2 * tile.blocks * tile.rows * tile.tokens,
        2 * token_tiles * row_tiles,
    )


def project_tokens(projection: Projection) -> None:
    """The projection's result: by its kernel, or where that would read x too often (once for every
    rank, a row of the adapter for every eight tokens), by a GEMM; both round its fp32 sums once."""
    x, adapter, result = projection
    if len(x) <= _KERNEL_TOKENS:
        run_projection(projection)
    else:
        torch.mm(x, adapter.to(x.dtype).t(), out=result)


def wgmma_matmul(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
    y: torch.Tensor,
    tile: WgmmaTile,
) -> torch.Tensor:
    """y [M,N] = x Ŵᵀ + scaling·xa lora_bᵀ + bias; operands as `fused_matmul` prepares them."""
    tokens, (rows, cols) = len(x), operands.shape
    rank = 0 if xa is None else xa.shape[1]
    scratch = scratch_sizes(tokens, rows, cols, rank, tile)
    torch.ops.qlora_kernels_cuda.wgmma_matmul.default(
        x,
        *weight_arguments(operands, rows, cols),
        None if bias is None else contiguous(bias.detach()),
        xa,
        None if lora_b is None else contiguous(lora_b.detach()),
        scaling,
        y,
        *tile,
        x.new_empty(scratch.arranged),
        x.new_empty(scratch.partials, dtype=torch.float32),
        tickets(scratch.tickets, x),
        current_stream(x),
    )
    return y
