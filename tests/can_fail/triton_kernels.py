"""Wrong Triton kernels, each with the test that must catch it. Run in the interpreter by
tests/triton/interpreter/test_can_fail.py.

No mutation reaches beyond a tensor's memory: the interpreter would write there. What no bound can
tell is left out: sums in another order, an operand that is not rounded.
"""

from __future__ import annotations

from tests.can_fail.triton_codecs import CODECS
from tests.can_fail.triton_mutation import TritonMutation
from tests.can_fail.triton_products import FEW_TOKENS, PRODUCTS

MUTATIONS: tuple[TritonMutation, ...] = (*CODECS, *PRODUCTS, *FEW_TOKENS)
