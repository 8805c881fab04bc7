"""e3m0: the 4-bit float without a mantissa, ±{0, 0.25, 0.5, 1, 2, 4, 8, 16} / 16 with absmax scales
(QLoRA, table 2)."""

from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

MAGNITUDES = (0.0, *(2.0**exponent for exponent in range(-2, 5)))

E3M0 = Codebook(
    "e3m0",
    [m / 16 for m in (*(-m for m in reversed(MAGNITUDES[1:])), *MAGNITUDES)],
    source="E3M0 of QLoRA table 2, as in llm-datatypes' FP4_LOG",
)

register_format(Format("e3m0", E3M0))
