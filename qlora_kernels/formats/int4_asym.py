"""int4_asym: 16 evenly spaced values from a block's least weight to its largest, scale and shift in
fp16 (GPTQ's and HQQ's 4-bit affine grid).

The grid is written about its middle, w = scale·(2k - 15)/15 + shift, scale half the range and shift
the middle: in exact arithmetic the same values as min + k·(max - min)/15, but with a product that
is no larger than the weights.
"""

from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

INT4_ASYM = Codebook(
    "int4_asym", [(2 * k - 15) / 15 for k in range(16)], source="asymmetric uniform grid"
)

register_format(
    Format("int4_asym", INT4_ASYM, scale_rule="minmax", shift="min", scale_store="fp16")
)
