"""int4: symmetric 4-bit integers c/7 for c = -7 … 7; code 15 has no value."""

from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

INT4 = Codebook(
    "int4",
    values=tuple((code - 7) / 7 for code in range(15)),
    source="symmetric uniform grid, absmax scaling (QLoRA table 2, Int4)",
)

register_format(Format("int4", INT4, encode_against="original"))
