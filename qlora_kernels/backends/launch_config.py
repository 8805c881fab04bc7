"""How the Triton matmuls go about a problem: a path, tiles, splits. Pure functions of sizes, dtype
and device facts; what they return prints, and is tested without a GPU.

The numbers follow from arithmetic (programs per SM, registers, bytes in flight) and from compiled
code; none of them has been timed on a GPU yet. A row of `TUNED` replaces the heuristic for exactly
the problem it names, on the GPU that it was measured on; there is none yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from qlora_kernels.backends.device import DeviceFacts

Path = Literal["few_tokens", "one_token", "fused", "dense"]

Decode = Literal["gather", "prmt"]

# Most tokens of the fused product; above it decoding once and a plain GEMM cost less than decoding
# again for every tile of tokens.
FUSED_TOKENS = 512
# Most tokens of the product that multiplies by scales after it has summed.
FEW_TOKENS = 32
# Widest rank that one tile holds; wider ones take several, each reading the large operand again.
LARGEST_TILE_R = 64
_SMALLEST_DOT = 16  # tl.dot's least extent
_FIXED_TILE_M = 64  # of batch-invariant products
# Weights of a scale for which few tokens' products are summed: a word of codes a lane of four.
_SMALLEST_GROUP = 32


class MatmulSizes(NamedTuple):
    """A product with a weight [N,K] of M tokens."""

    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    block_size: int
    batch_invariant: bool = False


@dataclass(frozen=True)
class MatmulConfig:
    """Tiles and schedule of one fused kernel.

    tile_m tokens, tile_n out_features, tile_k in_features; splits: programs that share an output
    tile, each with its part of the sum; decode: table lookups in shared memory, or by byte
    permutation in registers.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    splits: int
    num_warps: int
    num_stages: int
    decode: Decode = "gather"


# (device name, "few_tokens", "forward" or "backward", sizes) -> configuration, measured there.
TUNED: dict[tuple[str, str, MatmulSizes], MatmulConfig] = {}


def scale_group(block_size: int) -> int:
    """Neighbouring weights for which the fused kernels look a scale up once."""
    return min(block_size, 64)


def why_not_fused(sizes: MatmulSizes) -> str | None:
    """Why the fused kernels cannot take the weight, or None."""
    group = scale_group(sizes.block_size)
    if sizes.in_features % group:
        return f"in_features must be a multiple of {group}, got {sizes.in_features}"
    if sizes.tokens * sizes.out_features * sizes.in_features == 0:
        return "the product is empty"
    return None


def choose_path(sizes: MatmulSizes) -> Path:
    """ "few_tokens": table values decoded in registers, scales on the sums of a block. "one_token":
    fp32 products. "fused": Ŵ decoded inside the product. "dense": Ŵ decoded to scratch, then
    torch's GEMM. Batch-invariant products are always fused: which kernel a GEMM library picks
    depends on M."""
    if why_not_fused(sizes):
        return "dense"
    if sizes.batch_invariant:
        return "fused"
    narrow = sizes.dtype != torch.float32
    if narrow and sizes.tokens <= FEW_TOKENS and sizes.block_size >= _SMALLEST_GROUP:
        return "few_tokens"
    if sizes.tokens == 1:
        return "one_token"
    # fp32 products take no tensor cores in the fused kernels, whatever torch is set to.
    if sizes.tokens > FUSED_TOKENS or sizes.dtype == torch.float32:
        return "dense"
    return "fused"


def few_tokens_config(sizes: MatmulSizes, facts: DeviceFacts) -> MatmulConfig:
    """Of the product for few tokens: each warp has 64 columns of a tile of 256, so that K is split
    inside a program already."""
    tuned = TUNED.get((facts.name, "few_tokens", sizes))
    if tuned:
        return tuned
    tile_m = min(tile for tile in (8, 16, 32) if sizes.tokens <= tile)
    # Accumulators of every group: as many as stay in registers.
    tile_n = 64 if tile_m * 64 <= 16 * scale_group(sizes.block_size) else 32
    programs = -(-sizes.out_features // tile_n)
    # Three programs an SM, of two tiles or more.
    splits = max(1, min(3 * facts.sm_count // programs, sizes.in_features // 512, 16))
    return MatmulConfig(tile_m, tile_n, 256, splits, 4, 3, "prmt")


def forward_config(sizes: MatmulSizes, facts: DeviceFacts) -> MatmulConfig:
    """Of the fused forward. Depends on M in its token tile and the splits that follow from it,
    and not at all for a batch-invariant product."""
    tuned = TUNED.get((facts.name, "forward", sizes))
    if tuned:
        return tuned
    tile_m, decode = _tile_m(sizes), _fused_decode(sizes, facts)
    few = tile_m == _SMALLEST_DOT
    # A warpgroup multiplies 64 rows of the weight; larger tiles of tokens want more of them.
    tile_n = 64 if few else 128
    wide = few or (tile_m == 128 and decode == "prmt")
    tile_k = 128 if wide and sizes.in_features % 128 == 0 else 64
    num_warps, num_stages = (8 if tile_m == 128 else 4), (3 if tile_m == 128 and wide else 4)
    m_tiles = 1 if sizes.batch_invariant else -(-sizes.tokens // tile_m)
    programs = -(-sizes.out_features // tile_n) * m_tiles
    splits = _splits(programs, sizes.in_features, tile_k, facts)
    config = MatmulConfig(tile_m, tile_n, tile_k, splits, num_warps, num_stages, decode)
    return _fp32_sized(config, sizes)


def backward_config(sizes: MatmulSizes, facts: DeviceFacts) -> MatmulConfig:
    """Of the fused grad_x = grad_y Ŵ: tiles of in_features, a sum over out_features."""
    tuned = TUNED.get((facts.name, "backward", sizes))
    if tuned:
        return tuned
    tile_m, decode = _tile_m(sizes), _fused_decode(sizes, facts)
    num_warps = 8 if tile_m == 128 else 4
    wide = tile_m == 128 or decode == "prmt"
    tile_k = 128 if wide and sizes.in_features % 128 == 0 else 64
    tile_n = 128 if tile_m == 128 and decode == "prmt" else 64
    return _fp32_sized(MatmulConfig(tile_m, tile_n, tile_k, 1, num_warps, 3, decode), sizes)


class ThinConfig(NamedTuple):
    """Tiles of an adapter's product: tile_rows of tokens, tile_cols along the wide dimension,
    tile_rank; parts: how many programs share an output, each adding its part."""

    tile_rows: int
    tile_cols: int
    tile_rank: int
    parts: int


def tile_rank(rank: int) -> int:
    """Tile along R: a power of two from 16, the least that tl.dot takes."""
    return min(LARGEST_TILE_R, max(_SMALLEST_DOT, 1 << max(rank - 1, 0).bit_length()))


def down_config(
    tokens: int, in_features: int, rank: int, facts: DeviceFacts, batch_invariant: bool = False
) -> ThinConfig:
    """Of xa = x Aᵀ: few tokens share K between programs, many do not need to."""
    tile_rows = _FIXED_TILE_M if batch_invariant or tokens > 16 else 16
    tiles = 1 if batch_invariant else -(-tokens // tile_rows)
    return ThinConfig(tile_rows, 64, tile_rank(rank), _splits(tiles, in_features, 64, facts))


def up_gradients_config(
    tokens: int, out_features: int, rank: int, facts: DeviceFacts
) -> ThinConfig:
    """Of u and grad_B; parts are slices of the tokens."""
    return _slices(tokens, out_features, rank, 128, facts)


def down_gradient_config(
    tokens: int, in_features: int, rank: int, facts: DeviceFacts
) -> ThinConfig:
    """Of grad_A; parts are slices of the tokens."""
    return _slices(tokens, in_features, rank, 64, facts)


def extends_forward(tokens: int, out_features: int, in_features: int, rank: int) -> bool:
    """Whether the dense forward takes the adapter into one GEMM over K + R, which copies x (2MK
    bytes), or adds the GEMM to the adapter's term (4MN bytes)."""
    return rank <= LARGEST_TILE_R and 2 * out_features > in_features and tokens > FUSED_TOKENS


def extends_backward(tokens: int, out_features: int, in_features: int, rank: int) -> bool:
    """The same for grad_x = [grad_y | u] [Ŵ ; A]: a copy of grad_y against a pass over grad_x."""
    return rank <= LARGEST_TILE_R and 2 * in_features > out_features and tokens > FUSED_TOKENS


def extends_group_backward(
    tokens: int, out_features: int, in_features: int, members: int, most_rank: int
) -> bool:
    """Whether the dense grad_x of several projections is one GEMM over all their N and R, which
    copies every grad_y (2M bytes for each of `out_features`, the sum of N), or is summed member by
    member: 4MK bytes for each product after the first."""
    products = 2 * members - 1  # grad_y Ŵ and u A of each
    return (
        most_rank <= LARGEST_TILE_R
        and out_features < 2 * products * in_features
        and tokens > FUSED_TOKENS
    )


def _fused_decode(sizes: MatmulSizes, facts: DeviceFacts) -> Decode:
    """By counted instructions: in pairs of bf16, whose range is that of the scales, and where
    wgmma or tcgen05 takes x from shared memory. For mma.sync Triton then loads x in pieces."""
    return "prmt" if sizes.dtype == torch.bfloat16 and facts.capability >= 90 else "gather"


def _tile_m(sizes: MatmulSizes) -> int:
    if sizes.batch_invariant:
        return _FIXED_TILE_M
    for tile in (16, 32, 64):
        if sizes.tokens <= tile:
            return tile
    return 128 if sizes.tokens > 256 else 64


def _splits(programs: int, length: int, tile: int, facts: DeviceFacts) -> int:
    """Parts of a sum of `length` so that every SM has two programs, but no part shorter than 512
    or eight tiles."""
    wanted = max(1, 2 * facts.sm_count // max(programs, 1))
    return max(1, min(wanted, length // max(512, 8 * tile), 16))


def _slices(tokens: int, width: int, rank: int, tile_cols: int, facts: DeviceFacts) -> ThinConfig:
    tiles = -(-width // tile_cols)
    wanted = max(1, 2 * facts.sm_count // tiles)
    return ThinConfig(64, tile_cols, tile_rank(rank), max(1, min(wanted, tokens // 512, 16)))


def _fp32_sized(config: MatmulConfig, sizes: MatmulSizes) -> MatmulConfig:
    """fp32 tiles are twice as large and multiplied lane by lane: smaller ones, or they spill."""
    if sizes.dtype != torch.float32:
        return config
    return MatmulConfig(min(config.tile_m, 32), 64, 64, config.splits, 4, 2)
