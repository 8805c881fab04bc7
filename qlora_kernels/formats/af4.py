"""af4: 4-bit Abnormal Float (Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's
Good)", 2023): medians of w / absmax, so a table for each block size.

Its two halves are solved separately with the innermost cells ending at 0, and the code of 0 is put
in afterwards; solved as a whole it would err 0.4 dB less on normal weights at block size 64.
"""

from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.optimal_tables import TABLES
from qlora_kernels.formats.registry import register_format


def af4(block_size: int) -> Codebook:
    """AF4's table for one of the block sizes 16 … 4096."""
    return Codebook(
        f"af4_{block_size}", TABLES["af4"][block_size], source="Yoshida 2023, solved anew"
    )


register_format(Format("af4", codebook=af4))  # type: ignore[arg-type]  # a rule
