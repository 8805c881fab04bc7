"""e2m1: the 4-bit float of OCP's Microscaling specification, ±{0, 0.5, 1, 1.5, 2, 3, 4, 6} / 6 with
absmax scales; code 15 has no value, for there is one zero."""

from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import register_format

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*(-m for m in reversed(MAGNITUDES[1:])), *MAGNITUDES)
_SOURCE = "OCP Microscaling Formats (MX) Specification 1.0, E2M1"

E2M1 = Codebook("e2m1", [value / 6 for value in VALUES], source=f"{_SOURCE}, over 6")
# As it is, for scales that are powers of two.
E2M1_UNSCALED = Codebook("e2m1_unscaled", VALUES, source=_SOURCE)

register_format(Format("e2m1", E2M1))
