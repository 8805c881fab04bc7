"""nf3_*, nf2_*: NormalFloat at 3 and 2 bits.

Three incompatible tables go by these names, so the convention is part of ours:
- "offset": NF4's own outermost probability 0.9677083 at every bit width (LoftQ, FLUTE, LQ-LoRA);
- "tails": the outermost probability recomputed for the bit width (llm-datatypes' NF3);
- "symmetric": the middles between evenly spaced quantiles, so that 0 has no code (LoftQ's
  symmetric=True). Less squared error than the others at 2 bits, but weights near 0 all move.
"""

from __future__ import annotations

import itertools
from statistics import NormalDist
from typing import Literal

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantile_book import quantile_book
from qlora_kernels.formats.registry import register_format

Convention = Literal["offset", "tails", "symmetric"]
NF4_OFFSET = 0.9677083
_normal = NormalDist()


def nfk(bits: int, convention: Convention) -> Codebook:
    """The NormalFloat table of 2, 3 or 4 bits by one of the conventions.

    nfk(4, "offset") is NF4 to about 1e-7; nf4.py has the table itself.

    Raises:
        ArgumentError: bits or convention unknown.
    """
    name = f"nf{bits}_{convention}"
    if convention == "offset":
        return quantile_book(_normal.inv_cdf, bits, NF4_OFFSET, name)
    if convention == "tails":
        return quantile_book(_normal.inv_cdf, bits, None, name)
    if convention != "symmetric" or bits not in (2, 3, 4):
        rule = '"offset", "tails" or "symmetric", at 2 to 4 bits'
        raise argument_error("nfk", "convention", rule, f"{convention!r} at {bits}")
    levels = 2**bits
    step = (2 * NF4_OFFSET - 1) / levels
    quantiles = [_normal.inv_cdf(1.0 - NF4_OFFSET + step * i) for i in range(levels + 1)]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(quantiles)]
    # Symmetric but for rounding; halving differences makes it exact.
    values = [(middles[i] - middles[-1 - i]) / (2 * middles[-1]) for i in range(levels)]
    return Codebook(name, values, source="LoftQ's create_normal_map(symmetric=True)")


for _bits, _convention in ((3, "offset"), (3, "tails"), (2, "offset"), (2, "symmetric")):
    _book = nfk(_bits, _convention)  # type: ignore[arg-type]
    register_format(Format(_book.name, _book, pack="dense"))
