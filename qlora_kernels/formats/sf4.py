"""sf4: 4-bit Student Float, NF4's recipe with the quantiles of Student's t (Dotzel et al.,
"Learning from Students: Applying t-Distributions to Explore Accurate and Efficient Formats for
LLMs", 2024); 5 degrees of freedom fit the weights of most models."""

from __future__ import annotations

import functools
import math

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantile_book import quantile_book
from qlora_kernels.formats.registry import register_format


def student_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for whole degrees of freedom, as the finite sum (Abramowitz and Stegun,
    26.7.3-4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    term = cosine if degrees % 2 else 1.0
    total, start = 0.0, 2 if degrees % 2 else 1
    for k in range(start, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    if degrees % 2:
        return 0.5 + (theta + sine * total) / math.pi
    return 0.5 + sine * total / 2


def student_quantile(probability: float, degrees: int) -> float:
    """The t at which `student_cdf` is `probability`, by bisection."""
    low, high = -1e6, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if student_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sf(bits: int = 4, degrees: int = 5) -> Codebook:
    """The Student Float table.

    Args:
        bits: 2, 3 or 4.
        degrees: of freedom, a whole number from 1.

    Raises:
        ArgumentError: bits or degrees outside its range.
    """
    if not isinstance(degrees, int) or degrees < 1:
        raise argument_error("sf", "degrees", "a whole number from 1", repr(degrees))
    quantile = functools.partial(student_quantile, degrees=degrees)
    return quantile_book(quantile, bits, name=f"sf{bits}_{degrees}")


register_format(Format("sf4", sf(4, 5)))
