"""torch.ops.qlora_kernels.stored_*: the ops on weights that kernels do not take as they are stored.

Dense codes are unpacked and 16-bit scales widened for as long as an op runs, and the kernel that
the registry picks does the rest. Shifts add a small product: x Ŵᵀ = x (table·scale)ᵀ + (sums of x
over blocks)·shiftᵀ, where K is a multiple of the block size. What is left (tables per row, blocks
that straddle rows) is dequantized and multiplied by torch's GEMM. Nothing made here outlives the
op, so a backward saves what is stored and no more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from qlora_kernels.backends.registry import select
from qlora_kernels.formats.operands import (
    StoredOperands,
    WeightOperands,
    kernel_operands,
)
from qlora_kernels.ops.library import define, run_dequantize
from qlora_kernels.ops.quantized_matmul import matmul_problem
from qlora_kernels.reference import (
    decode_shifts_reference,
    decode_stored_scales_reference,
    dequantize_stored_reference,
)

STORED = (
    "Tensor codes, Tensor? absmax, Tensor? scale_codes, Tensor? scale_absmax, "
    "Tensor? scale_offset, Tensor? shift, Tensor? shift_codes, Tensor? shift_absmax, "
    "Tensor? shift_offset, Tensor codebook, SymInt[] shape, int block_size, "
    "int scale_block_size, int code_bits, str scale_store"
)
_SIZE = len(StoredOperands._fields)
_SHAPE = StoredOperands._fields.index("shape")
# Elements whose indices (8 bytes each) a table per row is looked up with at a time.
_LOOKUP_ELEMENTS = 1 << 20


def _operands_of(arguments: tuple[Any, ...]) -> StoredOperands:
    return StoredOperands(*arguments[:_SIZE])._replace(shape=tuple(arguments[_SHAPE]))


def _rest(arguments: tuple[Any, ...], *defaults: Any) -> list[Any]:
    """What follows the weight: the dispatcher leaves out trailing arguments that have their
    default, which are the last of `defaults`."""
    given = arguments[_SIZE:]
    return [*given, *defaults[len(given) :]]


def composed_of(stored: StoredOperands, multiplies: bool) -> str:
    """How a product with this weight, or its dequantization, is computed, for `explain`."""
    if stored.codebook.dim() == 2:
        looked_up = "looked up in each row's table by torch"
        return f"{looked_up}, then multiplied by torch's GEMM" if multiplies else looked_up
    steps = ["codes unpacked"] if stored.code_bits != 4 else []
    steps += ["scales widened"] if stored.absmax is not None else []
    if multiplies and kernel_part(stored) is None:
        return ", ".join([*steps, "dequantized by the kernel, shifts added, torch's GEMM"])
    steps.append("the kernel")
    if _has_shift(stored):
        steps.append("shifts times sums of x over blocks added" if multiplies else "shifts added")
    return ", ".join(steps)


def _has_shift(stored: StoredOperands) -> bool:
    return stored.shift is not None or stored.shift_codes is not None


def kernel_part(stored: StoredOperands) -> WeightOperands | None:
    """The operands of a matmul kernel, which leaves out shifts; None where no kernel helps."""
    straddles = stored.shape[-1] % stored.block_size != 0
    if stored.codebook.dim() == 2 or (_has_shift(stored) and straddles):
        return None
    return kernel_operands(stored)


def _shift_rows(stored: StoredOperands) -> torch.Tensor | None:
    """Shifts fp32 [N, K / block_size], where rows hold whole blocks."""
    shifts = decode_shifts_reference(stored)
    return (
        None
        if shifts is None
        else shifts.view(stored.shape[0], stored.shape[1] // stored.block_size)
    )


def dense_stored(
    stored: StoredOperands, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The dense weight, bit for bit `reference.dequantize_stored_reference`."""
    if stored.codebook.dim() == 2:
        dense = _dequantize_rows(stored, dtype)
        return dense if out is None else out.copy_(dense)
    shifts = decode_shifts_reference(stored)
    if shifts is None:
        return run_dequantize(kernel_operands(stored), dtype, out)
    wide = run_dequantize(kernel_operands(stored), torch.float32)
    size, flat = stored.block_size, wide.view(-1)
    whole = flat.numel() // size
    flat[: whole * size].view(whole, size).add_(shifts[:whole, None])
    if whole < shifts.numel():
        flat[whole * size :].add_(shifts[whole])
    return wide.to(dtype) if out is None else out.copy_(wide)


def _dequantize_rows(stored: StoredOperands, dtype: torch.dtype) -> torch.Tensor:
    """A weight with a table per row, some rows at a time where they begin with a byte and a
    block."""
    rows, size = stored.codebook.shape[0], stored.block_size
    cols = math.prod(stored.shape) // max(rows, 1)
    step = max(1, _LOOKUP_ELEMENTS // max(cols, 1))
    if cols % size or rows <= step:
        return dequantize_stored_reference(stored, dtype)
    dense = torch.empty(rows, cols, dtype=dtype, device=stored.codes.device)
    scales, shifts = decode_stored_scales_reference(stored), decode_shifts_reference(stored)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        blocks = slice(begin * cols // size, end * cols // size)
        bits = cols * stored.code_bits // 8  # bytes a row: cols is a multiple of 16
        part = stored._replace(
            codes=stored.codes[begin * bits : end * bits],
            absmax=scales[blocks],
            scale_codes=None,
            shift=None if shifts is None else shifts[blocks],
            shift_codes=None,
            codebook=stored.codebook[begin:end],
            shape=(end - begin, cols),
        )
        dense[begin:end] = dequantize_stored_reference(part, dtype)
    return dense.view(stored.shape)


def _fake_dequantize(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    return codes.new_empty(rest[_SHAPE - 1], dtype=rest[_SIZE - 1])


@define(f"stored_dequantize({STORED}, ScalarType dtype) -> Tensor", _fake_dequantize)
def _stored_dequantize(*arguments: Any) -> torch.Tensor:
    return dense_stored(_operands_of(arguments), arguments[_SIZE])


def _fake_matmul(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], arguments[_SHAPE][0])


@define(
    f"stored_matmul(Tensor x, {STORED}, Tensor? bias=None, bool batch_invariant=False) -> Tensor",
    _fake_matmul,
)
def run_stored_matmul(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    stored = _operands_of(arguments)
    bias, batch_invariant = _rest(arguments, None, False)
    operands = kernel_part(stored)
    if operands is None:
        return _dense_product(x, dense_stored(stored, x.dtype), bias, batch_invariant)
    problem = matmul_problem("quantized_matmul", x, operands, 0, batch_invariant)
    y: torch.Tensor = select(problem).fn(x, operands, bias, batch_invariant)
    return _with_shifts(y, x, stored, batch_invariant)


def _fake_backward_input(grad_y: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return grad_y.new_empty(grad_y.shape[0], arguments[_SHAPE][1])


@define(f"stored_matmul_backward_input(Tensor grad_y, {STORED}) -> Tensor", _fake_backward_input)
def run_stored_matmul_backward_input(grad_y: torch.Tensor, *arguments: Any) -> torch.Tensor:
    stored = _operands_of(arguments)
    operands = kernel_part(stored)
    if operands is None:
        return grad_y @ dense_stored(stored, grad_y.dtype)
    problem = matmul_problem("quantized_matmul_backward_input", grad_y, operands)
    grad_x: torch.Tensor = select(problem).fn(grad_y, operands)
    return _with_shifts_backward(grad_x, grad_y, stored)


def _fake_qlora(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, lora_a = x.shape[0], arguments[_SIZE]
    return x.new_empty(tokens, arguments[_SHAPE][0]), x.new_empty(tokens, lora_a.shape[0])


@define(
    f"stored_qlora_linear(Tensor x, {STORED}, Tensor lora_a, Tensor lora_b, float scaling, "
    "Tensor? bias=None, float dropout_p=0.0, Tensor? seed=None, bool batch_invariant=False) "
    "-> (Tensor, Tensor)",
    _fake_qlora,
)
def run_stored_qlora_linear(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    stored = _operands_of(arguments)
    lora_a, lora_b, scaling, bias, dropout_p, seed, batch_invariant = _rest(
        arguments, None, None, None, None, 0.0, None, False
    )
    operands = kernel_part(stored)
    if operands is not None:
        problem = matmul_problem("qlora_linear", x, operands, lora_a.shape[0], batch_invariant)
        y, xa = select(problem).fn(
            x, operands, lora_a, lora_b, scaling, bias, dropout_p, seed, batch_invariant
        )
        return _with_shifts(y, x, stored, batch_invariant), xa
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    y = _dense_product(x, dense_stored(stored, x.dtype), bias, batch_invariant)
    xa = _dense_product(_dropped(x, dropout_p, seed), a, None, batch_invariant)
    return y + scaling * _dense_product(xa, b, None, batch_invariant), xa


def _fake_qlora_backward(
    grad_y: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lora_a, lora_b = arguments[_SIZE : _SIZE + 2]
    needs_x, needs_a, needs_b = arguments[_SIZE + 5]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        lora_a.new_empty(lora_a.shape if needs_a else (0,)),
        lora_b.new_empty(lora_b.shape if needs_b else (0,)),
    )


@define(
    f"stored_qlora_linear_backward(Tensor grad_y, Tensor x, Tensor xa, {STORED}, Tensor lora_a, "
    "Tensor lora_b, float scaling, float dropout_p, Tensor? seed, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_qlora_backward,
)
def run_stored_qlora_linear_backward(
    grad_y: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stored = _operands_of(arguments)
    lora_a, lora_b, scaling, dropout_p, seed, needs = arguments[_SIZE:]
    operands = kernel_part(stored)
    if operands is not None:
        problem = matmul_problem("qlora_linear_backward", grad_y, operands, lora_a.shape[0])
        grad_x, grad_a, grad_b = select(problem).fn(
            grad_y, x, xa, operands, lora_a, lora_b, scaling, dropout_p, seed, tuple(needs)
        )
        return (
            _with_shifts_backward(grad_x, grad_y, stored) if needs[0] else grad_x,
            grad_a,
            grad_b,
        )
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    grad_x, grad_a, grad_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    u = scaling * (grad_y @ b)
    if needs[0]:
        grad_x = grad_y @ dense_stored(stored, x.dtype) + _dropped(u @ a, dropout_p, seed)
    if needs[1]:
        grad_a = (u.t() @ _dropped(x, dropout_p, seed)).to(lora_a.dtype)
    if needs[2]:
        grad_b = (grad_y.t() @ xa).to(lora_b.dtype).mul_(scaling)
    return grad_x, grad_a, grad_b


def _dropped(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    if seed is None:
        return x
    dropped: torch.Tensor = torch.ops.qlora_kernels.dropout(x, dropout_p, seed)
    return dropped


def _dense_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, by_rows: bool
) -> torch.Tensor:
    """F.linear, or a row at a time: then a row's bits do not depend on the others."""
    bias = None if bias is None else bias.to(x.dtype)
    if not by_rows or x.shape[0] == 0:
        return F.linear(x, weight, bias)
    y = torch.stack([weight @ row for row in x])
    return y if bias is None else y + bias


def _with_shifts(
    y: torch.Tensor, x: torch.Tensor, stored: StoredOperands, by_rows: bool
) -> torch.Tensor:
    """y plus what the shifts add: the sums of x over blocks, [M, K / block_size], times theirs."""
    shifts = _shift_rows(stored)
    if shifts is None:
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    blocks = x.reshape(x.shape[0], shifts.shape[1], stored.block_size)
    sums = blocks.sum(dim=2, dtype=wide)
    return (y.to(wide) + _dense_product(sums, shifts.to(wide), None, by_rows)).to(y.dtype)


def _with_shifts_backward(
    grad_x: torch.Tensor, grad_y: torch.Tensor, stored: StoredOperands
) -> torch.Tensor:
    """grad_x plus grad_y [M, N] times the shifts, the same for every weight of a block."""
    shifts = _shift_rows(stored)
    if shifts is None:
        return grad_x
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    added = (grad_y.to(wide) @ shifts.to(wide)).repeat_interleave(stored.block_size, dim=1)
    return (grad_x.to(wide) + added).to(grad_x.dtype)
