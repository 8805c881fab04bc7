"""kmeans, kmeans_row, any4: tables that are learned for a weight, or for each of its rows.

kmeans: 16-means of w / absmax for the whole weight, from NF4, -1, 0 and 1 pinned: without pins a
learner gives the outliers up. kmeans_row: the same for each row. any4 (Lou et al., "any4: Learned
4-bit Numeric Representation for LLMs", 2025): 16-means for each row of weights that are scaled to
their block's range, unpinned. Tables are stored in fp16. `quantize(…, importance=…)` weights the
squared errors, e.g. by Fisher information or by the mean square of each input channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qlora_kernels.formats.format import Format
from qlora_kernels.formats.int4_asym import INT4_ASYM
from qlora_kernels.formats.nf4 import NF4
from qlora_kernels.formats.registry import register_format


def kmeans(
    scope: Literal["tensor", "row"] = "tensor",
    pins: Sequence[float] = (-1.0, 0.0, 1.0),
    name: str = "",
) -> Format:
    """A Format whose table is learned for each weight, or for each row.

    Raises:
        ArgumentError: as `Format`.
    """
    return Format(name, NF4, lut_scope=scope, pins=tuple(pins))


register_format(kmeans("tensor", name="kmeans"))
register_format(kmeans("row", name="kmeans_row"))
register_format(
    Format(
        "any4",
        INT4_ASYM,
        scale_rule="minmax",
        shift="min",
        scale_store="fp16",
        lut_scope="row",
    )
)
