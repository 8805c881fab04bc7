"""fp4: bitsandbytes' 4-bit float, sign and magnitude; code order is not value order and code 8 is
a second zero."""

from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

# In twelfths: 0.0625 is the "subnormal" as bitsandbytes stores it (0.005208333), not IEEE's half
# step.
MAGNITUDES = tuple(m / 12 for m in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))

FP4 = Codebook(
    "fp4",
    values=MAGNITUDES + tuple(0.0 if m == 0 else -m for m in MAGNITUDES),
    tie="sign_magnitude",
    source="bitsandbytes 0.50 (csrc/kernels.cu, dDequantizeFP4)",
)

register_format(Format("fp4", FP4, encode_against="original"))
