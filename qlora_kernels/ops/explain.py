"""explain: which kernel would run an op on a weight, and why each of the others would not."""

from __future__ import annotations

import torch

from qlora_kernels.backends.registry import OPS, Problem, explain_problem
from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.ops.library import dequantize_problem
from qlora_kernels.ops.quantized_matmul import matmul_problem


def explain(
    op: str,
    qw: QuantizedWeight,
    dtype: torch.dtype | None = None,
    *,
    tokens: int = 1,
    rank: int = 16,
    batch_invariant: bool = False,
) -> str:
    """Which kernel would run `op` on `qw`, and why each of the others was passed over.

    Args:
        op: one of `qlora_kernels.backends.OPS`.
        qw: the weight; for quantize and double_quantize, the one that would come out.
        dtype: of x for the matmuls, of the dense weight for the codecs; None: the weight's own.
        tokens, rank: M and R of a matmul.
        batch_invariant: of a matmul.

    Raises:
        ArgumentError: an unknown op, or a matmul on a weight that is not 2-D.
        ArgumentTypeError: not a QuantizedWeight.
    """
    if op not in OPS:
        raise argument_error("explain", "op", f"one of {OPS}", repr(op))
    if not isinstance(qw, QuantizedWeight):
        raise type_error("explain", "qw", "a QuantizedWeight", type(qw).__name__)
    return explain_problem(_problem(op, qw, dtype or qw.dtype, tokens, rank, batch_invariant))


def _problem(
    op: str, qw: QuantizedWeight, dtype: torch.dtype, tokens: int, rank: int, batch_invariant: bool
) -> Problem:
    device_type = qw.device.type
    if op == "dequantize":
        return dequantize_problem(qw.operands(), dtype)
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
    x = torch.empty(0, dtype=dtype, device=qw.device)
    problem = matmul_problem(op, x, qw.operands(), rank if "lora" in op else 0, batch_invariant)
    return problem._replace(tokens=tokens)
