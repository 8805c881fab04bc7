"""What `explain` says of a Triton matmul: the path and the tiles that launch_config.py chooses.

Says what is chosen elsewhere; chooses nothing itself.
"""

from __future__ import annotations

import torch

from qlora_kernels.backends.device import DeviceFacts, device_facts
from qlora_kernels.backends.launch_config import (
    FUSED_TOKENS,
    MatmulConfig,
    MatmulSizes,
    backward_config,
    choose_path,
    extends_backward,
    extends_forward,
    few_tokens_config,
    forward_config,
    why_not_fused,
)
from qlora_kernels.backends.registry import Problem


def matmul_path(problem: Problem) -> str:
    """The path of a product with Ŵ or its grad_x on the current device; a group is taken as one
    weight of all its rows."""
    return describe(problem, device_facts(torch.device(problem.device_type)))


def describe(problem: Problem, facts: DeviceFacts) -> str:
    """`matmul_path` on a GPU of these facts."""
    backward = "backward" in problem.op
    tokens, rows, cols = problem.tokens, problem.out_features, problem.in_features
    invariant = problem.batch_invariant and not backward
    sizes = MatmulSizes(tokens, rows, cols, problem.dtype, problem.block_size, invariant)
    if tokens * rows * cols == 0:
        return "nothing to compute"
    path = choose_path(sizes)
    if path == "dense":
        extends = extends_backward if backward else extends_forward
        joined = problem.rank and extends(tokens, rows, cols, problem.rank)
        adapter = " over the adapter too" if joined else ""
        return f"dequantize + GEMM{adapter}; not fused: {_why_dense(sizes)}"
    if backward:
        return f"fused ({_tiles(backward_config(sizes, facts))})"
    if path == "one_token":
        return "one_token: fused, fp32"
    if path == "few_tokens":
        return f"few_tokens: fused ({_tiles(few_tokens_config(sizes, facts))})"
    return f"fused ({_tiles(forward_config(sizes, facts))})"


def _why_dense(sizes: MatmulSizes) -> str:
    """Why `choose_path` says "dense"."""
    reason = why_not_fused(sizes)
    if reason is None and sizes.tokens <= FUSED_TOKENS:
        return "float32 products of several tokens take no tensor cores there"
    return reason or f"tokens must be at most {FUSED_TOKENS}, got {sizes.tokens}"


def _tiles(config: MatmulConfig) -> str:
    tile = f"tiles of {config.tile_m} tokens, {config.tile_n} rows, {config.tile_k} columns"
    return f"{tile}, sum in {config.splits}, decode by {config.decode}"
