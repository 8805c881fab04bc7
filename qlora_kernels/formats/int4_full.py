"""int4_full: all 16 integers, k / 8 for k = -8 … 7; the scale has the sign that takes the block's
maximum to -8 (llama.cpp's Q4_0, Intel Neural Compressor's full_range)."""

from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

INT4_FULL = Codebook(
    "int4_full", [k / 8 for k in range(-8, 8)], source="llama.cpp Q4_0, without its fp16 scale"
)

register_format(Format("int4_full", INT4_FULL, scale_rule="signed_absmax", scale_store="sign7"))
