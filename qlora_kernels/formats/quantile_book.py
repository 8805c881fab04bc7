"""Tables of quantiles: NF4's recipe for any distribution and number of bits.

h = 2^(bits - 1); the positive values are the quantiles of h + 1 probabilities evenly spaced from
`offset` to 1/2, without the last; the negative ones those of h, mirrored; and 0; all divided by the
largest (bitsandbytes' create_normal_map).
"""

from __future__ import annotations

from collections.abc import Callable

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.codebook import Codebook

Quantile = Callable[[float], float]


def own_offset(bits: int) -> float:
    """The mean of the outer tails of 2^bits and 2^bits - 1 bins: 1 - ½(1/2^(bits+1) + 1/(2^(bits+1)
    - 2)); for 4 bits 0.967708…, of which bitsandbytes has seven digits."""
    bins: int = 2 ** (bits + 1)
    return 1.0 - 0.5 * (1 / bins + 1 / (bins - 2))


def quantile_book(
    quantile: Quantile, bits: int = 4, offset: float | None = None, name: str = "quantiles"
) -> Codebook:
    """The table of a distribution that is symmetric about 0.

    Args:
        quantile: probability -> quantile, as scipy's `ppf`.
        bits: 2, 3 or 4.
        offset: the outermost probability, above 1/2; default `own_offset(bits)`.
        name: of the codebook.

    Raises:
        ArgumentError: bits or offset outside its range.
    """
    if bits not in (2, 3, 4):
        raise argument_error("quantile_book", "bits", "2, 3 or 4", repr(bits))
    offset = own_offset(bits) if offset is None else offset
    if not 0.5 < offset < 1.0:
        raise argument_error("quantile_book", "offset", "between 0.5 and 1", offset)
    half = 2 ** (bits - 1)
    positive = [float(quantile(p)) for p in _spaced(offset, half + 1)]
    negative = [-float(quantile(p)) for p in _spaced(offset, half)]
    values = [*negative, 0.0, *reversed(positive)]
    largest = max(abs(value) for value in values)
    source = f"NF4's recipe, {bits} bits, outermost probability {offset:.7f}"
    return Codebook(name, [value / largest for value in values], source=source)


def _spaced(offset: float, count: int) -> list[float]:
    """`count` probabilities from offset down to 1/2, without the last."""
    return [offset + (0.5 - offset) * i / (count - 1) for i in range(count - 1)]
