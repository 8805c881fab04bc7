"""mxfp4: E2M1 in blocks of 32 under a power of two, 2^(floor(log2 absmax) - 2) in 8 bits (OCP
Microscaling Formats specification 1.0, MXFP4). Codes above 6 scales saturate."""

from qlora_kernels.formats.e2m1 import E2M1_UNSCALED
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

register_format(
    Format(
        "mxfp4",
        E2M1_UNSCALED,
        block_size=32,
        scale_rule="power_of_two",
        scale_store="e8m0",
    )
)
