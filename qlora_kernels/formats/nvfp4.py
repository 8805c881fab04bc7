"""nvfp4: E2M1 in blocks of 16 with float8 (E4M3) scales times one fp32 for the weight (NVIDIA's
NVFP4).

The table is E2M1 over 6, so the fp32 scale is absmax / 448 where NVIDIA's is absmax / (448·6).
The CPU's kernels, which decode 32 weights under one scale, run twice; the CUDA ones reject the
block size.
"""

from qlora_kernels.formats.e2m1 import E2M1
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

register_format(Format("nvfp4", E2M1, block_size=16, scale_store="e4m3"))
