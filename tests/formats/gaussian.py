"""The error of a format on normal weights in closed form, an integral over a block's extremes."""

from __future__ import annotations

import functools
import math

import torch

from qlora_kernels.formats import Format
from qlora_kernels.formats.block_maximum import BlockMaximum
from qlora_kernels.reference.encode_scales import decode_stored_scales, encode_scales_reference
from qlora_kernels.reference.scale_rules import scales_reference

POINTS = 160


@functools.lru_cache(maxsize=1)
def normal_blocks(block_size: int, numel: int = 1 << 20) -> torch.Tensor:
    """Standard normal weights [blocks, block_size] whose blocks' largest magnitudes are evenly
    spread over their distribution: how those happen to fall is most of what a sample strays by."""
    generator = torch.Generator().manual_seed(0)
    blocks = numel // block_size
    even = (torch.arange(blocks, dtype=torch.float64) + 0.5) / blocks
    largest = torch.special.ndtri((1 + even ** (1 / block_size)) / 2)
    largest = largest[torch.randperm(blocks, generator=generator)][:, None]
    inside = 2 * torch.special.ndtr(largest) - 1
    uniform = torch.rand(blocks, block_size, generator=generator, dtype=torch.float64)
    rest = torch.special.ndtri(0.5 + (uniform - 0.5) * inside)
    sign = (torch.randint(2, (blocks, 1), generator=generator) * 2 - 1).double()
    place = torch.randint(block_size, (blocks, 1), generator=generator)
    return rest.scatter(1, place, largest * sign).float()


def by_block_maximum(fmt: Format, second: torch.Tensor | None) -> float:
    """NMSE in dB where a block's scale is a function of its largest magnitude m.

    second: the second-level scale of an e4m3 weight. Stores with one a block of scales are taken
    as exact: 8 bits move the error by less than the tolerance of the tests.
    """
    jumps = fmt.scale_rule == "power_of_two" or fmt.scale_store == "e4m3"
    block = BlockMaximum(fmt.block_size, 20_000 if jumps else 300)
    if fmt.scale_rule == "power_of_two":
        one_each = torch.zeros(len(block.m), fmt.block_size)
        one_each[:, 0] = block.m.float()
        decoded = scales_reference(one_each.reshape(-1), fmt).double()
    elif fmt.scale_store == "e4m3":
        stored = encode_scales_reference("e4m3", block.m.float(), 256, second)
        decoded = decode_stored_scales("e4m3", stored, 256).double()
    else:
        decoded = block.m
    signed = fmt.scale_rule == "signed_absmax"
    values = fmt.codebook.values
    if signed and max(values) < -min(values):
        values = tuple(-value for value in values)
    return 10 * math.log10(block.error(values, decoded, signed))


def _pdf(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def by_range(fmt: Format) -> float:
    """NMSE in dB of "minmax": the least and the largest weight of a block are exact, the others
    normals cut off at them."""
    size = fmt.block_size
    step = 12.0 / POINTS
    grid = -6.0 + step * (torch.arange(POINTS, dtype=torch.float64) + 0.5)
    low, high = grid[:, None].expand(-1, POINTS), grid[None, :].expand(POINTS, -1)
    inside = (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=0)
    density = size * (size - 1) * inside ** (size - 2) * _pdf(low) * _pdf(high) * step * step
    density = torch.where(high > low, density, 0.0)
    assert abs(float(density.sum()) - 1) < 1e-3
    points = torch.tensor(sorted(fmt.codebook.values), dtype=torch.float64)
    scale = (high - low) / (points[-1] - points[0])
    value = scale[..., None] * (points - points[0]) + low[..., None]
    middle = (value[..., 1:] + value[..., :-1]) / 2
    edges = torch.cat([low[..., None], middle, high[..., None]], dim=-1)
    a, b = edges[..., :-1], edges[..., 1:]
    mass = torch.special.ndtr(b) - torch.special.ndtr(a)
    first, second = _pdf(a) - _pdf(b), mass + a * _pdf(a) - b * _pdf(b)
    cells = (second - 2 * value * first + value * value * mass).sum(dim=-1)
    error = torch.where(density > 0, cells / inside.clamp(min=1e-300), 0.0)
    return 10 * math.log10(float((density * error).sum()) * (size - 2) / size)
