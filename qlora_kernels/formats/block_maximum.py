"""Normal weights in blocks that are scaled by their largest magnitude: distribution, optimal
tables, error of a table.

B independent standard normals, m the largest magnitude: it has the density B·(2Φ(m) - 1)^(B - 1) ·
2φ(m). The one weight that attains it sits at ±1 after scaling (at +1 with a signed scale); the
others, given m, are normals cut off at ±m. So every expectation over x = w / m is an integral over
m of a closed form in x, and what is left is a sum over a grid of m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

Criterion = Literal["mse", "mae"]
Moments = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_LARGEST = 9.0  # beyond it 2·(1 - Φ(m)) is 2e-19: no block has such a maximum
# The midpoint rule converges faster than any power where the integrand is smooth: 300 points are
# exact to rounding.
_POINTS = 300
_LLOYD_STEPS = 50
_SQRT2 = math.sqrt(2.0)


def _cdf(x: torch.Tensor) -> torch.Tensor:
    twice: torch.Tensor = torch.special.erfc(-x / _SQRT2)
    return twice * 0.5


def _pdf(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


class BlockMaximum:
    """The distribution for blocks of `block_size` weights.

    Attributes:
        m: grid of maxima, fp64 [P].
        weight: their probabilities, which sum to 1.
        inside: probability that a normal lies within ±m.
    """

    def __init__(self, block_size: int, points: int = _POINTS) -> None:
        """points: of the grid of m; what is integrated and not smooth in m needs more."""
        self.block_size = block_size
        step = _LARGEST / points
        self.m = (torch.arange(points, dtype=torch.float64) + 0.5) * step
        self.inside = torch.special.erf(self.m / _SQRT2)
        log_density = (
            math.log(2.0 * block_size)
            + (block_size - 1) * self.inside.log()
            - 0.5 * self.m * self.m
            - 0.5 * math.log(2.0 * math.pi)
        )
        self.weight = log_density.exp() * step

    def moments(self, power: int) -> Moments:
        """For the weights that are not the maximum, each counted m^power: t in ±1 to the mass and
        the first moment of x between 0 and t."""
        share = 1.0 - 1.0 / self.block_size
        counted = (self.weight * self.m**power / self.inside * share)[:, None]
        column = self.m[:, None]

        def up_to(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            at = column * t.double()[None, :]
            mass = (counted * (_cdf(at) - 0.5)).sum(dim=0)
            moment = (counted * (_pdf(torch.zeros_like(at)) - _pdf(at)) / column).sum(dim=0)
            return mass, moment

        return up_to

    def error(self, values: Sequence[float], decoded: torch.Tensor, signed: bool) -> float:
        """E (w - ŵ)² of a standard normal w, its block's scale `decoded` [P] for each m of the
        grid and its code the nearest.

        signed: whether the largest weight is scaled to +1 rather than ±1. `values` need not be
        normalised.
        """
        points = torch.tensor(sorted(values), dtype=torch.float64)
        middle = (points[1:] + points[:-1]) / 2
        edges = torch.cat([points.new_tensor([-math.inf]), middle, points.new_tensor([math.inf])])
        m, scale = self.m[:, None], decoded.double()[:, None]
        low = torch.maximum(edges[None, :-1] * scale, -m).minimum(m)
        high = torch.minimum(edges[None, 1:] * scale, m).maximum(-m)
        value = points[None, :] * scale
        # ∫ (w - v)² φ over [low, high].
        mass = _cdf(high) - _cdf(low)
        first = _pdf(low) - _pdf(high)
        second = mass + low * _pdf(low) - high * _pdf(high)
        cells = (second - 2 * value * first + value * value * mass).sum(dim=1) / self.inside
        ends = [self.m] if signed else [self.m, -self.m]
        at_end = sum((end[:, None] - value).square().amin(dim=1) for end in ends) / len(ends)
        share = 1.0 / self.block_size
        return float((self.weight * ((1 - share) * cells + share * at_end)).sum())


def gaussian_nmse_db(values: Sequence[float], block_size: int, signed: bool = False) -> float:
    """10·log10 of E (w - ŵ)² / E w² for normal weights under `values` and exact absmax scales."""
    block = BlockMaximum(block_size)
    return 10.0 * math.log10(block.error(values, block.m, signed))


def optimal_table(
    levels: int,
    block_size: int,
    pins: Sequence[float],
    criterion: Criterion = "mse",
) -> tuple[float, ...]:
    """The table of `levels` values with `pins` among them that errs least on the weights
    themselves: every x = w / m is counted m² (mse) or m (mae).

    Lloyd's iterations, then Newton's on the condition that each value is its cell's mean (or
    median).

    Args:
        levels: number of values.
        block_size: weights per scale.
        pins: values that stay; the ends ±1 must be among them where a block's maximum falls.
        criterion: squared or absolute error.
    """
    table = torch.linspace(-1.0, 1.0, levels, dtype=torch.float64)
    pinned = torch.zeros(levels, dtype=torch.bool)
    for pin in pins:
        nearest = int((table - pin).abs().masked_fill(pinned, math.inf).argmin())
        table[nearest], pinned[nearest] = pin, True
    power = {"mse": 2, "mae": 1}[criterion]
    conditions = _Conditions(BlockMaximum(block_size).moments(power), criterion, -1.0, 1.0)
    return tuple(solve(table, pinned, conditions).tolist())


class _Conditions:
    """What an optimal table on [low, high] satisfies, from the moments of x."""

    def __init__(self, up_to: Moments, criterion: Criterion, low: float, high: float) -> None:
        self.up_to, self.criterion = up_to, criterion
        self.ends = torch.tensor([low, high], dtype=torch.float64)

    def edges(self, table: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.ends[:1], (table[1:] + table[:-1]) / 2, self.ends[1:]])

    def means(self, table: torch.Tensor) -> torch.Tensor:
        """The mean of each value's cell."""
        mass, moment = self.up_to(self.edges(table))
        return moment.diff() / mass.diff()

    def residual(self, table: torch.Tensor) -> torch.Tensor:
        """Zero where each value is the mean, or the median, of its cell."""
        mass, moment = self.up_to(self.edges(table))
        if self.criterion == "mse":
            return moment.diff() - table * mass.diff()
        return 2 * self.up_to(table)[0] - mass[1:] - mass[:-1]


def solve(table: torch.Tensor, pinned: torch.Tensor, conditions: _Conditions) -> torch.Tensor:
    """The table that satisfies the conditions where it is not pinned."""
    for _ in range(_LLOYD_STEPS):
        table = torch.where(pinned, table, conditions.means(table))
    free = ~pinned
    for _ in range(30):
        jacobian: Any = torch.autograd.functional.jacobian(conditions.residual, table)
        step = torch.zeros_like(table)
        step[free] = torch.linalg.solve(jacobian[free][:, free], conditions.residual(table)[free])
        table = table - step
        if float(step.abs().max()) < 1e-13:
            break
    return table


def median_table(levels: int, block_size: int, side: Literal[-1, 1]) -> tuple[float, ...]:
    """`levels` values on one side of 0, the outer one pinned at ±1, whose cells, the innermost
    ending at 0, have their values as medians of x = w / m: one half of AF4."""
    low, high = (-1.0, 0.0) if side < 0 else (0.0, 1.0)
    table = torch.linspace(low, high, levels + 2, dtype=torch.float64)
    table = table[:-2] if side < 0 else table[2:]
    pinned = table.abs() == 1.0
    conditions = _Conditions(BlockMaximum(block_size).moments(0), "mae", low, high)
    return tuple(solve(table, pinned, conditions).tolist())
