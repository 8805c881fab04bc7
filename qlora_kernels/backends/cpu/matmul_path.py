"""How the CPU matmuls go about a problem: fused kernels, or panels of Ŵ and torch's GEMM.

`choose_path` is pure: sizes, dtype and level in, a name out. The numbers in it were measured on one
Intel Xeon with AVX-512 and AMX (2 threads); bench/cases/quantized_matmul.py times the paths.
"""

from __future__ import annotations

from typing import Literal

import torch

from qlora_kernels.backends.cpu.common import ISA_NAMES

Path = Literal["dot", "tiles", "panels"]

_AMX = ISA_NAMES.index("amx")
AVX512_BF16 = ISA_NAMES.index("avx512_bf16")
_AVX512 = ISA_NAMES.index("avx512")
_AVX2 = ISA_NAMES.index("avx2")
# Most tokens of the fused dot products, by level; a GEMM on panels is faster above.
_DOT_TOKENS = {0: 4, _AVX2: 12, _AVX512: 40, AVX512_BF16: 24, _AMX: 24}
# The same of the forward of bf16, which multiplies as integers.
_INTEGER_DOT_TOKENS = {AVX512_BF16: 64}
# Fewest tokens that keep the tiles of the forward busy enough; a grad_x decodes columns, which the
# dot products do no faster for a single token.
TILE_LEAST_TOKENS = 5


def most_dot_tokens(isa: int, dtype: torch.dtype, backward: bool = False) -> int:
    """Most tokens for which the dot products of a level are faster than a GEMM on panels."""
    if dtype == torch.bfloat16 and not backward:
        return _INTEGER_DOT_TOKENS.get(isa, _DOT_TOKENS[isa])
    return _DOT_TOKENS[isa]


def choose_path(
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    isa: int,
    batch_invariant: bool = False,
    backward: bool = False,
) -> Path:
    """Which way a product of x [M,K] and Ŵ [N,K], or of grad_y [M,N] and Ŵ, is computed.

    "dot": each weight decoded once per pass, products with a few tokens. "tiles": AMX, any
    number of tokens. "panels": Ŵ decoded panel by panel, each multiplied by torch's GEMM
    (panels.py). With batch_invariant only paths whose rows do not depend on M.

    Args:
        tokens, out_features, in_features: M, N, K.
        dtype: of x; fp16 and fp32 compute in fp32.
        isa: index into `ISA_NAMES`.
        batch_invariant: whether a row's bits may not depend on the other rows.
        backward: whether it is grad_y and Ŵ.
    """
    if isa >= _AMX and dtype == torch.bfloat16:
        few = tokens < (1 if backward else TILE_LEAST_TOKENS) and not batch_invariant
        return "dot" if few or out_features * in_features == 0 else "tiles"
    if batch_invariant or out_features * in_features == 0:
        return "dot"
    return "dot" if tokens <= most_dot_tokens(isa, dtype, backward) else "panels"
