"""What `explain` says of a CPU matmul: the path that matmul_path.py chooses, and why.

Says what is chosen elsewhere; chooses nothing itself.
"""

from __future__ import annotations

from qlora_kernels.backends.cpu.common import LEAST_BLOCK_SIZE
from qlora_kernels.backends.cpu.matmul_path import (
    choose_path,
    most_dot_tokens,
)
from qlora_kernels.backends.cpu.panels import gemm_dtype
from qlora_kernels.backends.cpu.small_blocks import are_small
from qlora_kernels.backends.registry import Problem


def matmul_path(isa: int, problem: Problem) -> str:
    """The path of a product with Ŵ or its grad_x at a level, an index into `ISA_NAMES`; a group is
    taken as one weight of all its rows."""
    backward = "backward" in problem.op
    rows, cols, dtype = problem.out_features, problem.in_features, problem.dtype
    if problem.tokens * rows * cols == 0:
        return "nothing to compute"
    depth = rows if backward else cols
    invariant = problem.batch_invariant and not backward
    small = are_small(problem.block_size)
    chosen = choose_path(problem.tokens, rows, cols, dtype, isa, invariant, backward)
    path = "panels" if small else chosen
    if path == "dot":
        return "dot: fused dot products"
    if path == "tiles":
        return "tiles: fused, AMX products of bf16"
    gemm = str(gemm_dtype(dtype, isa, depth, problem.rank)).removeprefix("torch.")
    if small:
        parts, why = "whole", f"block_size must be at least {LEAST_BLOCK_SIZE}"
        got: object = problem.block_size
    else:
        most = most_dot_tokens(isa, dtype, backward)
        parts, why = "panel by panel", f"tokens must be at most {most}"
        got = problem.tokens
    return f"panels: dequantize {parts} + torch's {gemm} GEMM; not dot: {why}, got {got}"
