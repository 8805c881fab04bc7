"""How the CPU matmuls go about a problem: fused kernels, or panels of Ŵ and torch's GEMM.

`choose_path` is pure: sizes, dtype and level in, a name out. The numbers in it were measured on one
Intel Xeon with AVX-512 and AMX (2 threads); bench/cases/quantized_matmul.py times the paths.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Literal

import torch

from qlora_kernels.backends.cpu.common import ISA_NAMES, weight_arguments
from qlora_kernels.formats.quantized_weight import WeightOperands

Path = Literal["dot", "tiles", "panels"]

# As csrc/bindings/cpu_qlora_linear.cpp numbers them.
PATH_NUMBER: dict[Path, int] = {"dot": 0, "tiles": 1, "panels": 2}

_AMX = ISA_NAMES.index("amx")
_AVX512 = ISA_NAMES.index("avx512")
_AVX2 = ISA_NAMES.index("avx2")
# Most tokens of the fused fp32 dot products, by level; a GEMM on panels is faster above.
_DOT_TOKENS = {0: 4, _AVX2: 12, _AVX512: 24}
_TILE_LEAST_TOKENS = 2
# Scratch for a panel of Ŵ.
PANEL_BYTES = 8 << 20

_scratch = threading.local()


def choose_path(
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    isa: int,
    batch_invariant: bool = False,
) -> Path:
    """Which way a product of x [M,K] and Ŵ [N,K], or of grad_y [M,N] and Ŵ, is computed.

    "dot": each weight decoded once per pass, fp32 products with a few tokens. "tiles": AMX, any
    number of tokens. "panels": Ŵ decoded panel by panel into scratch of at most PANEL_BYTES, each
    multiplied by torch's GEMM. With batch_invariant only paths whose rows do not depend on M.

    Args:
        tokens, out_features, in_features: M, N, K.
        dtype: of x; fp16 and fp32 compute in fp32.
        isa: index into `ISA_NAMES`.
        batch_invariant: whether a row's bits may not depend on the other rows.
    """
    if isa >= _AMX and dtype == torch.bfloat16:
        few = tokens < _TILE_LEAST_TOKENS and not batch_invariant
        return "dot" if few or out_features * in_features == 0 else "tiles"
    if batch_invariant or out_features * in_features == 0:
        return "dot"
    return "dot" if tokens <= _DOT_TOKENS[min(isa, _AVX512)] else "panels"


def _panel_scratch(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, cols] of this thread's one buffer per dtype, contents undefined."""
    buffers: dict[torch.dtype, torch.Tensor] = _scratch.__dict__.setdefault("buffers", {})
    numel = rows * cols
    if dtype not in buffers or buffers[dtype].numel() < numel:
        buffers[dtype] = torch.empty(numel, dtype=dtype)
    return buffers[dtype][:numel].view(rows, cols)


def _panels(length: int, width: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Ranges that cover `length` rows (or columns) of `width` elements, PANEL_BYTES at most each.

    At least 16 are taken together, whatever their bytes.
    """
    step = max(16, PANEL_BYTES // (max(width, 1) * dtype.itemsize) // 16 * 16)
    for begin in range(0, length, step):
        yield begin, min(length, begin + step)


def _gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 is multiplied in fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


def matmul_by_panels(isa: int, x: torch.Tensor, operands: WeightOperands) -> torch.Tensor:
    """x Ŵᵀ [M,N], a panel of Ŵ's rows at a time."""
    rows, cols = operands.shape
    dtype = _gemm_dtype(x.dtype)
    wide, weight = x.to(dtype), weight_arguments(operands)
    y = torch.empty(len(x), rows, dtype=dtype)
    for begin, end in _panels(rows, cols, dtype):
        panel = _panel_scratch(end - begin, cols, dtype)
        torch.ops.qlora_kernels_cpu.decode_panel.default(*weight, begin, 0, panel, isa)
        torch.mm(wide, panel.t(), out=y[:, begin:end])
    return y.to(x.dtype)


def backward_by_panels(isa: int, grad_y: torch.Tensor, operands: WeightOperands) -> torch.Tensor:
    """grad_y Ŵ [M,K], a panel of Ŵ's columns at a time."""
    rows, cols = operands.shape
    dtype = _gemm_dtype(grad_y.dtype)
    wide, weight = grad_y.to(dtype), weight_arguments(operands)
    grad_x = torch.empty(len(grad_y), cols, dtype=dtype)
    for begin, end in _panels(cols, rows, dtype):
        panel = _panel_scratch(rows, end - begin, dtype)
        torch.ops.qlora_kernels_cpu.decode_panel.default(*weight, 0, begin, panel, isa)
        torch.mm(wide, panel, out=grad_x[:, begin:end])
    return grad_x.to(grad_y.dtype)
