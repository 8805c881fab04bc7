"""The CPU matmuls for many tokens: panels of Ŵ that stay in cache, multiplied by torch's GEMM.

The adapter's products are GEMMs too, added to the same sums before their one rounding.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from qlora_kernels.backends.cpu.common import bf16_gemm_pays, weight_arguments
from qlora_kernels.backends.cpu.dropout import dropout_cpu
from qlora_kernels.backends.cpu.matmul_path import AVX512_BF16
from qlora_kernels.backends.cpu.small_blocks import are_small, dequantize_small
from qlora_kernels.formats.quantized_weight import WeightOperands

# Scratch for a panel of Ŵ.
PANEL_BYTES = 16 << 20
# Columns below which torch's GEMM is slow: panels of 151,936 rows by 27 columns took it three times
# as long as blocks of 8192 by 512 (512 tokens, fp32).
LEAST_COLUMNS = 512
# Tokens whose fp32 copies an adapter's gradient needs at a time.
GRADIENT_TOKENS = 2048

_scratch = threading.local()
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def _without_grad(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`torch.no_grad`, which is entered only where gradients are on: not inside a Function."""

    @functools.wraps(function)
    def called(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        if not torch.is_grad_enabled():
            return function(*arguments, **options)
        with torch.no_grad():
            return function(*arguments, **options)

    return called


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`Tensor.to`, which takes a microsecond to do nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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


def gemm_dtype(dtype: torch.dtype, isa: int, *depths: int) -> torch.dtype:
    """fp16 is multiplied in fp32, and so is bf16 where the CPU's bf16 products are no faster.

    512 tokens, Golden Cove: torch's bf16 GEMM takes 1.8 times as long as its fp32 one with AMX
    switched off, and five times without AVX512_BF16. With AMX it multiplies pairs: where a sum is
    over an odd number of them it reads one of the next row as well and multiplies it by zero, and a
    NaN there spreads (torch 2.13).

    Args:
        depths: over how many products the GEMMs sum.
    """
    native = dtype == torch.bfloat16 and isa >= AVX512_BF16 and bf16_gemm_pays()
    return torch.bfloat16 if native and not any(n % 2 for n in depths) else torch.float32


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
    if dtype == torch.float32 and rows * LEAST_COLUMNS * dtype.itemsize > PANEL_BYTES:
        return _backward_in_blocks(isa, grad_y, weight, rows, cols)
    grad_x = torch.empty(grad_y.shape[0], cols, dtype=dtype)
    for begin, end in _panels(cols, rows, dtype):
        panel = _panel_scratch(rows, end - begin, dtype)
        torch.ops.qlora_kernels_cpu.decode_panel.default(*weight, 0, begin, panel, isa)
        torch.mm(grad_y, panel, out=grad_x[:, begin:end])
    return grad_x


def _backward_in_blocks(
    isa: int, grad_y: torch.Tensor, weight: tuple[object, ...], rows: int, cols: int
) -> torch.Tensor:
    """The same where so many rows leave room for few columns only: blocks of both, added up."""
    width = min(cols, LEAST_COLUMNS)
    grad_x = torch.empty(grad_y.shape[0], cols)
    for col in range(0, cols, width):
        end = min(cols, col + width)
        for begin, row_end in _panels(rows, end - col, torch.float32):
            panel = _panel_scratch(row_end - begin, end - col, torch.float32)
            torch.ops.qlora_kernels_cpu.decode_panel.default(*weight, begin, col, panel, isa)
            sums, part = grad_x[:, col:end], grad_y[:, begin:row_end]
            torch.addmm(sums, part, panel, beta=0.0 if begin == 0 else 1.0, out=sums)
    return grad_x


@_without_grad
def matmul_by_panels(
    isa: int, x: torch.Tensor, operands: WeightOperands, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x Ŵᵀ + bias [M,N]; one rounding, as in torch's F.linear."""
    dtype = gemm_dtype(x.dtype, isa, x.shape[1])
    wide_bias = None if bias is None else bias.to(dtype)
    return _product(isa, x.to(dtype), operands, wide_bias).to(x.dtype)


@_without_grad
def backward_by_panels(isa: int, grad_y: torch.Tensor, operands: WeightOperands) -> torch.Tensor:
    """grad_y Ŵ [M,K]."""
    dtype = gemm_dtype(grad_y.dtype, isa, grad_y.shape[1])
    return _backward_product(isa, grad_y.to(dtype), operands).to(grad_y.dtype)


@_without_grad
def qlora_by_panels(
    isa: int,
    x: torch.Tensor,
    dropped: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M,N] and xa [M,R], which may be given; `dropped` is x after dropout."""
    storage, dtype = x.dtype, gemm_dtype(x.dtype, isa, *lora_a.shape)
    b = _cast(_cast(lora_b, storage), dtype)
    if xa is None:
        xa = down_projection(dropped, lora_a, dtype)
    wide_bias = None if bias is None else _cast(bias, dtype)
    y = _product(isa, _cast(x, dtype), operands, wide_bias)
    y.addmm_(_cast(xa, dtype), b.t(), alpha=scaling)
    return _cast(y, storage), xa


@_without_grad
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
    u: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x, grad_a, grad_b, empty where not needed; `dropped` is x after dropout, and u
    [M,R] = scaling·grad_y B may be given."""
    storage, dtype = grad_y.dtype, gemm_dtype(grad_y.dtype, isa, *lora_b.shape)
    wide = _cast(grad_y, dtype)
    if u is None:
        u = up_gradient(grad_y, lora_b, scaling, dtype) if needs[0] or needs[1] else xa
    if needs[0]:
        a = _cast(_cast(lora_a, storage), dtype)
        sums = _backward_product(isa, wide, operands)
        if dropout_p and seed is not None:
            sums += dropout_cpu(isa, torch.mm(_cast(u, dtype), a), dropout_p, seed)
        else:
            sums.addmm_(_cast(u, dtype), a)
        grad_x = _cast(sums, storage)
    else:
        grad_x = dropped.new_empty(0)
    grad_a = adapter_gradient(u, dropped, lora_a.dtype) if needs[1] else lora_a.new_empty(0)
    grad_b = (
        adapter_gradient(grad_y, xa, lora_b.dtype, scaling) if needs[2] else lora_b.new_empty(0)
    )
    return grad_x, grad_a, grad_b


@_without_grad
def down_projection(x: torch.Tensor, lora_a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """xa = x Aᵀ [M,R] in x's dtype, by torch's GEMM in `dtype`."""
    a = _cast(_cast(lora_a, x.dtype), dtype)
    return _cast(torch.mm(_cast(x, dtype), a.t()), x.dtype)


@_without_grad
def up_gradient(
    grad_y: torch.Tensor, lora_b: torch.Tensor, scaling: float, dtype: torch.dtype
) -> torch.Tensor:
    """u = scaling·grad_y B [M,R] in grad_y's dtype, by torch's GEMM in `dtype`."""
    b = _cast(_cast(lora_b, grad_y.dtype), dtype)
    u = torch.empty(grad_y.shape[0], b.shape[1], dtype=dtype)
    torch.addmm(u, _cast(grad_y, dtype), b, beta=0.0, alpha=scaling, out=u)
    return _cast(u, grad_y.dtype)


@_without_grad
def adapter_gradient(
    left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, scaling: float = 1.0
) -> torch.Tensor:
    """scaling·leftᵀ right, summed in fp32: an adapter's gradient is not rounded to the GEMM's."""
    if left.shape[0] <= GRADIENT_TOKENS:
        sums = torch.mm(left.float().t(), right.float())
    else:
        sums = torch.zeros(left.shape[1], right.shape[1])
        for begin in range(0, left.shape[0], GRADIENT_TOKENS):
            part = slice(begin, begin + GRADIENT_TOKENS)
            sums.addmm_(left[part].float().t(), right[part].float())
    return _cast(sums if scaling == 1.0 else sums.mul_(scaling), dtype)
