"""explain: which kernel would run an op on a weight, by which path, and why not the others."""

from __future__ import annotations

import torch

from qlora_kernels.backends.registry import OPS, Problem, explain_problem
from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.operands import StoredOperands, WeightOperands, kernel_operands
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.ops.dequantize_many import dequantize_many_problem
from qlora_kernels.ops.library import dequantize_problem
from qlora_kernels.ops.quantized_matmul import matmul_problem
from qlora_kernels.ops.stored import composed_of, kernel_part

# Ops that make a weight, or take none.
_OF_NO_WEIGHT = ("quantize", "double_quantize", "dropout")


def explain(
    op: str,
    qw: QuantizedWeight,
    dtype: torch.dtype | None = None,
    *,
    tokens: int = 1,
    rank: int = 16,
    batch_invariant: bool = False,
) -> str:
    """Which kernel would run `op` on `qw`, by which path, and why the others were passed over.

    A kernel of products with several ways of going about one says the way it takes, and why not the
    ones before it: "decode", passes over the weight, "wgmma" or "dequantize + GEMM" in CUDA, "dot",
    "tiles" (AMX) or "panels" on the CPU. On GPUs that is for the current device, and for an adapter
    without dropout.

    Args:
        op: one of `qlora_kernels.backends.OPS`.
        qw: the weight; for quantize and double_quantize, the one that would come out.
        dtype: of x for the matmuls, of the dense weight for the codecs; None: the weight's own.
        tokens, rank: M and R of a matmul.
        batch_invariant: of a matmul.

    Returns:
        A line for the problem, and one a kernel, in the order in which they are asked.

    Raises:
        ArgumentError: an unknown op, a negative size, or a matmul on a weight that is not 2-D.
        ArgumentTypeError: not a QuantizedWeight, or not a dtype.
    """
    if op not in OPS:
        raise argument_error("explain", "op", f"one of {OPS}", repr(op))
    if not isinstance(qw, QuantizedWeight):
        raise type_error("explain", "qw", "a QuantizedWeight", type(qw).__name__)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise type_error("explain", "dtype", "a torch.dtype", repr(dtype))
    for name, size in (("tokens", tokens), ("rank", rank)):
        if size < 0:
            raise argument_error("explain", name, "at least 0", size)
    operands = qw.operands()
    if isinstance(operands, StoredOperands) and op not in _OF_NO_WEIGHT:
        return _explain_stored(op, operands, dtype or qw.dtype, tokens, rank, batch_invariant)
    return explain_problem(_problem(op, qw, dtype or qw.dtype, tokens, rank, batch_invariant))


def _explain_stored(
    op: str,
    stored: StoredOperands,
    dtype: torch.dtype,
    tokens: int,
    rank: int,
    batch_invariant: bool,
) -> str:
    """The steps of a weight that kernels do not take as it is stored, and the kernel in them."""
    multiplies = not op.startswith("dequantize")
    if multiplies and len(stored.shape) != 2:
        raise argument_error("explain", "qw", f"2-D for {op}", f"shape {stored.shape}")
    steps = f"{op}: {composed_of(stored, multiplies)}"
    kernel = kernel_part(stored) if multiplies else None
    if kernel is not None:
        x = torch.empty(0, dtype=dtype, device=stored.codes.device)
        chosen = matmul_problem(op, x, kernel, rank if "lora" in op else 0, batch_invariant)
        return f"{steps}\n{explain_problem(chosen._replace(tokens=tokens))}"
    if stored.codebook.dim() != 1:
        return steps
    return f"{steps}\n{explain_problem(dequantize_problem(kernel_operands(stored), dtype))}"


def _problem(
    op: str, qw: QuantizedWeight, dtype: torch.dtype, tokens: int, rank: int, batch_invariant: bool
) -> Problem:
    device_type, operands = qw.device.type, qw.operands()
    if isinstance(operands, WeightOperands) and op == "dequantize":
        return dequantize_problem(operands, dtype)
    if isinstance(operands, WeightOperands) and op == "dequantize_many":
        return dequantize_many_problem([operands], dtype)
    if op == "quantize":
        size = qw.format.block_size
        return Problem(op, device_type, dtype, in_features=qw.numel, block_size=size)
    if op == "double_quantize":
        blocks, size = -(-qw.numel // qw.format.block_size), qw.format.scale_block_size
        return Problem(op, device_type, torch.float32, in_features=blocks, block_size=size)
    if len(qw.shape) != 2:
        raise argument_error("explain", "qw", f"2-D for {op}", f"shape {qw.shape}")
    if op == "dropout":
        return Problem(op, device_type, dtype, in_features=tokens * qw.shape[1])
    assert isinstance(operands, WeightOperands)  # `explain` has sent the others elsewhere
    x = torch.empty(0, dtype=dtype, device=qw.device)
    problem = matmul_problem(op, x, operands, rank if "lora" in op else 0, batch_invariant)
    return problem._replace(tokens=tokens)
