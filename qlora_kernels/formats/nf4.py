"""nf4: 4-bit NormalFloat with bitsandbytes' table (Dettmers et al., "QLoRA", 2023, appendix E).

The literals are the definition: scipy's norm.ppf over a float32 linspace ending at 0.9677083
reproduces them, other routes are off by ulps. torchao's "NF4" has four-digit values and is a
different format.
"""

from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

NF4 = Codebook(
    "nf4",
    values=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    source="bitsandbytes 0.50 (csrc), QLoRA appendix E",
)

register_format(Format("nf4", NF4, encode_against="original"))
