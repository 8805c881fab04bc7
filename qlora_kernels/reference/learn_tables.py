"""Learned tables: k-means of w / scale, one table a weight or one a row, and the codes under them.

The objective is the squared error of the weight, Σ importance·(w - scale·table[code])², so a
normalised weight counts with scale². Lloyd's iterations from the format's codebook (a row's from
the whole weight's table), over sorted values: a cell is a range of them, its centroid a difference
of two sums. Values that are pinned stay. Tables are rounded to fp16, in which they are stored.
"""

from __future__ import annotations

import torch

from qlora_kernels.formats.format import Format
from qlora_kernels.formats.packing import pack, pack_dense
from qlora_kernels.reference.scale_rules import spread

MAX_ITERATIONS = 100
# Lloyd has converged when no value moves by more than an eighth of fp16's step at 1.
TOLERANCE = 2.0**-14
# A whole weight is reduced to this many values before it is clustered.
HISTOGRAM_BINS = 1 << 16
_CHUNK_ELEMENTS = 1 << 22


def learn_tables(
    w: torch.Tensor, scales: torch.Tensor, fmt: Format, importance: torch.Tensor | None
) -> torch.Tensor:
    """Tables fp16 [1, L] or [N, L], ascending, for a weight whose shifts are taken off.

    Args:
        w: of any shape (lut_scope "row": its first dimension is the rows).
        scales: fp32 [n_blocks], decoded.
        fmt: where the learner starts, pins and scope.
        importance: fp32, of w's shape, or None.
    """
    start = torch.tensor(sorted(fmt.codebook.values), dtype=torch.float64, device=w.device)
    rows = w.shape[0] if fmt.lut_scope == "row" and w.dim() > 1 else 1
    if w.numel() == 0:
        return start.to(torch.float16).expand(rows, -1).contiguous()
    points, weights = _normalised(w.reshape(-1), scales, fmt.block_size, importance)
    summary = [part.view(1, -1) for part in _histogram(points, weights)]
    shared = _lloyd(summary[0], summary[1], start, fmt.pins)
    if fmt.lut_scope == "tensor":
        return shared.to(torch.float16)
    # From the whole weight's table a row can only gain; from far away it may end in a worse place.
    points, weights, start = points.view(rows, -1), weights.view(rows, -1), shared[0]
    step = max(1, _CHUNK_ELEMENTS // points.shape[1])
    parts = [
        _lloyd(points[i : i + step], weights[i : i + step], start, fmt.pins)
        for i in range(0, rows, step)
    ]
    return torch.cat(parts).to(torch.float16)


def _normalised(
    flat: torch.Tensor, scales: torch.Tensor, block_size: int, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """w / scale and its weight, importance·scale²; both 0 where the scale is 0 or NaN."""
    usable = scales.isfinite() & (scales != 0)
    inverse = torch.where(usable, 1.0 / scales, 0.0)
    squares = torch.where(usable, scales.square(), 0.0)
    points = flat.to(torch.float32) * spread(inverse, block_size, flat.numel())
    weights = spread(squares, block_size, flat.numel())
    if importance is not None:
        weights = weights * importance.reshape(-1)
    finite = points.isfinite()
    return torch.where(finite, points, 0.0), torch.where(finite, weights, 0.0)


def _histogram(points: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The means and weights of equal bins between the least and the largest point, fp64."""
    low, high = points.aminmax()
    width = ((high - low) / HISTOGRAM_BINS).clamp(min=torch.finfo(torch.float32).tiny)
    bins = ((points - low) / width).to(torch.int64).clamp_(max=HISTOGRAM_BINS - 1)
    total = torch.bincount(bins, weights.double(), HISTOGRAM_BINS)
    moment = torch.bincount(bins, (weights * points).double(), HISTOGRAM_BINS)
    centres = low.double() + (torch.arange(HISTOGRAM_BINS, device=bins.device) + 0.5) * width
    return torch.where(total > 0, moment / total, centres), total


def _lloyd(
    points: torch.Tensor, weights: torch.Tensor, start: torch.Tensor, pins: tuple[float, ...]
) -> torch.Tensor:
    """Tables fp64 [rows, L], ascending, from points and weights [rows, n]."""
    rows, levels = points.shape[0], start.numel()
    order = points.argsort(dim=1)
    ascending = points.gather(1, order).double()
    counted = weights.gather(1, order).double()
    zero = counted.new_zeros(rows, 1)
    total = torch.cat([zero, counted.cumsum(dim=1)], dim=1)
    moment = torch.cat([zero, (counted * ascending).cumsum(dim=1)], dim=1)
    table = start.expand(rows, levels).contiguous()
    pinned = torch.zeros(levels, dtype=torch.bool, device=table.device)
    for pin in pins:
        nearest = int((start - pin).abs().masked_fill(pinned, torch.inf).argmin())
        table[:, nearest], pinned[nearest] = pin, True
    ends = torch.full((rows, 1), points.shape[1], device=table.device)
    for _ in range(MAX_ITERATIONS):
        middle = (table[:, 1:] + table[:, :-1]) / 2
        cut = torch.searchsorted(ascending, middle.contiguous(), right=True)
        cut = torch.cat([torch.zeros_like(ends), cut, ends], dim=1)
        mass = total.gather(1, cut).diff(dim=1)
        centroid = moment.gather(1, cut).diff(dim=1) / mass
        moved = torch.where((mass > 0) & ~pinned, centroid, table)
        change = (moved - table).abs().max()
        table = moved
        if float(change) < TOLERANCE:
            break
    return table.sort(dim=1).values


def codes_by_row(
    w: torch.Tensor, scales: torch.Tensor, tables: torch.Tensor, fmt: Format
) -> torch.Tensor:
    """Packed codes nearest to w under decoded scales and tables fp16 [rows, L]; the last row's pad
    and blocks whose scale is 0 or NaN get the code nearest to 0.

    A code is the number of fp64 midpoints below w / scale, so a tie takes the lower value.
    """
    rows, numel = tables.shape[0], w.numel()
    wide = tables.double()
    middle = ((wide[:, 1:] + wide[:, :-1]) / 2).contiguous()
    nearest_zero = wide.abs().argmin(dim=1)
    per_row = numel // rows if rows else 0
    flat = w.reshape(-1)
    spread_scales = spread(scales, fmt.block_size, numel)
    codes = torch.empty(numel, dtype=torch.uint8, device=w.device)
    step = max(1, _CHUNK_ELEMENTS // max(per_row, 1))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        part = slice(begin * per_row, end * per_row)
        divisor = spread_scales[part].double()
        ratio = (flat[part].double() / divisor).view(end - begin, per_row)
        found = torch.searchsorted(middle[begin:end], ratio, right=False)
        unusable = ~(divisor.isfinite() & (divisor != 0)).view(end - begin, per_row)
        unusable |= ~ratio.isfinite()
        found = torch.where(unusable, nearest_zero[begin:end, None], found)
        codes[part] = found.to(torch.uint8).view(-1)
    if fmt.code_bits != 4:
        return pack_dense(codes, fmt.code_bits)
    return pack(codes, int(nearest_zero[-1]) if rows else 0)
