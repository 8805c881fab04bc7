"""The CPU matmuls for many tokens: panels of Ŵ that stay in cache, multiplied by torch's GEMM.

The adapter's products are GEMMs too, added to the same sums before their one rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from qlora_kernels.backends.cpu.common import bf16_gemm_pays, weight_arguments
from qlora_kernels.backends.cpu.dropout import dropout_cpu
from qlora_kernels.backends.cpu.matmul_path import AVX512_BF16
from qlora_kernels.backends.cpu.small_blocks import are_small, dequantize_small
from qlora_kernels.formats.quantized_weight import WeightOperands

# Scratch for a panel of Ŵ.
PANEL_BYTES = 16 << 20
# Tokens whose fp32 copies an adapter's gradient needs at a time.
GRADIENT_TOKENS = 2048

_scratch = threading.local()


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


def _gemm_dtype(dtype: torch.dtype, isa: int) -> torch.dtype:
    """fp16 is multiplied in fp32, and so is bf16 where the CPU's bf16 products are no faster.

    512 tokens, Golden Cove: torch's bf16 GEMM takes 1.8 times as long as its fp32 one with AMX
    switched off, and five times without AVX512_BF16.
    """
    native = dtype == torch.bfloat16 and isa >= AVX512_BF16 and bf16_gemm_pays()
    return torch.bfloat16 if native else torch.float32


def _product(
    isa: int, x: torch.Tensor, operands: WeightOperands, bias: torch.Tensor | None
) -> torch.Tensor:
    """x Ŵᵀ + bias [M,N] in the GEMM's dtype, a panel of Ŵ's rows at a time."""
    rows, cols = operands.shape
    dtype, weight = x.dtype, weight_arguments(operands)
    if are_small(operands.block_size):
        return F.linear(x, dequantize_small(isa, operands, dtype).view(rows, cols), bias)
    if rows * cols * dtype.itemsize <= PANEL_BYTES:
        # One panel: torch allocates the result, and no slice of it is made.
        panel = _panel_scratch(rows, cols, dtype)
        torch.ops.qlora_kernels_cpu.decode_panel.default(*weight, 0, 0, panel, isa)
        return F.linear(x, panel, bias)
    y = torch.empty(x.shape[0], rows, dtype=dtype)
    for begin, end in _panels(rows, cols, dtype):
        panel = _panel_scratch(end - begin, cols, dtype)
        torch.ops.qlora_kernels_cpu.decode_panel.default(*weight, begin, 0, panel, isa)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, begin:end])
        else:
            torch.addmm(bias[begin:end], x, panel.t(), out=y[:, begin:end])
    return y


def _backward_product(isa: int, grad_y: torch.Tensor, operands: WeightOperands) -> torch.Tensor:
    """grad_y Ŵ [M,K] in the GEMM's dtype, a panel of Ŵ's columns at a time."""
    rows, cols = operands.shape
    dtype, weight = grad_y.dtype, weight_arguments(operands)
    if are_small(operands.block_size):
        return grad_y @ dequantize_small(isa, operands, dtype).view(rows, cols)
    if rows * cols * dtype.itemsize <= PANEL_BYTES:
        panel = _panel_scratch(rows, cols, dtype)
        torch.ops.qlora_kernels_cpu.decode_panel.default(*weight, 0, 0, panel, isa)
        return torch.mm(grad_y, panel)
    grad_x = torch.empty(grad_y.shape[0], cols, dtype=dtype)
    for begin, end in _panels(cols, rows, dtype):
        panel = _panel_scratch(rows, end - begin, dtype)
        torch.ops.qlora_kernels_cpu.decode_panel.default(*weight, 0, begin, panel, isa)
        torch.mm(grad_y, panel, out=grad_x[:, begin:end])
    return grad_x


@torch.no_grad()
def matmul_by_panels(
    isa: int, x: torch.Tensor, operands: WeightOperands, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x Ŵᵀ + bias [M,N]; one rounding, as in torch's F.linear."""
    dtype = _gemm_dtype(x.dtype, isa)
    wide_bias = None if bias is None else bias.to(dtype)
    return _product(isa, x.to(dtype), operands, wide_bias).to(x.dtype)


@torch.no_grad()
def backward_by_panels(isa: int, grad_y: torch.Tensor, operands: WeightOperands) -> torch.Tensor:
    """grad_y Ŵ [M,K]."""
    dtype = _gemm_dtype(grad_y.dtype, isa)
    return _backward_product(isa, grad_y.to(dtype), operands).to(grad_y.dtype)


@torch.no_grad()
def qlora_by_panels(
    isa: int,
    x: torch.Tensor,
    dropped: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M,N] and xa [M,R]; `dropped` is x after dropout."""
    dtype = _gemm_dtype(x.dtype, isa)
    a, b = (adapter.to(x.dtype).to(dtype) for adapter in (lora_a, lora_b))
    xa = (dropped.to(dtype) @ a.t()).to(x.dtype)
    wide_bias = None if bias is None else bias.to(dtype)
    y = _product(isa, x.to(dtype), operands, wide_bias)
    y.addmm_(xa.to(dtype), b.t(), alpha=scaling)
    return y.to(x.dtype), xa


@torch.no_grad()
def qlora_backward_by_panels(
    isa: int,
    grad_y: torch.Tensor,
    dropped: torch.Tensor,
    xa: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x, grad_a, grad_b, empty where not needed; `dropped` is x after dropout."""
    storage, dtype = grad_y.dtype, _gemm_dtype(grad_y.dtype, isa)
    a, b = (adapter.to(storage).to(dtype) for adapter in (lora_a, lora_b))
    wide = grad_y.to(dtype)
    grad_x = dropped.new_empty(0)
    grad_a, grad_b = lora_a.new_empty(0), lora_b.new_empty(0)
    u = (wide @ b).mul_(scaling).to(storage) if needs[0] or needs[1] else xa
    if needs[0]:
        sums = _backward_product(isa, wide, operands)
        if dropout_p and seed is not None:
            sums += dropout_cpu(isa, u.to(dtype) @ a, dropout_p, seed)
        else:
            sums.addmm_(u.to(dtype), a)
        grad_x = sums.to(storage)
    if needs[1]:
        grad_a = _gradient(u, dropped).to(lora_a.dtype)
    if needs[2]:
        grad_b = _gradient(grad_y, xa).mul_(scaling).to(lora_b.dtype)
    return grad_x, grad_a, grad_b


def _gradient(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ right in fp32: an adapter's gradient is not rounded to the GEMM's dtype."""
    sums = torch.zeros(left.shape[1], right.shape[1])
    for begin in range(0, left.shape[0], GRADIENT_TOKENS):
        part = slice(begin, begin + GRADIENT_TOKENS)
        sums.addmm_(left[part].float().t(), right[part].float())
    return sums
