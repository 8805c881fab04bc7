"""What `explain` says of a CUDA matmul: its path, why not the ones before it, the adapter's part.

Says what matmul_path.py, extension_path.py and gradient_path.py choose; chooses nothing itself.
"""

from __future__ import annotations

import torch

from qlora_kernels.backends.cuda.extension_path import extends_forward
from qlora_kernels.backends.cuda.gradient_path import (
    GradientSizes,
    choose_gradient_path,
    projects_while_copying,
)
from qlora_kernels.backends.cuda.matmul_path import (
    TILE_N,
    MatmulSizes,
    choose_path,
    choose_splits,
    fused_tile_tokens,
    why_dense,
    why_not_fused,
    why_not_wgmma,
)
from qlora_kernels.backends.cuda.wgmma import choose_wgmma_tile
from qlora_kernels.backends.device import DeviceFacts, device_facts
from qlora_kernels.backends.registry import Problem

GEMM, EMPTY = "dequantize + GEMM", "nothing to compute"


def forward_path(problem: Problem) -> str:
    """The path of quantized_matmul, qlora_linear or qlora_group on the current device; a group is
    taken as one weight of all its rows."""
    return describe_forward(problem, device_facts(torch.device("cuda")))


def backward_path(problem: Problem) -> str:
    """The same of their backwards."""
    return describe_backward(problem, device_facts(torch.device("cuda")))


def describe_forward(problem: Problem, facts: DeviceFacts) -> str:
    """`forward_path` on a GPU of these facts."""
    sizes = MatmulSizes(
        problem.tokens,
        problem.out_features,
        problem.in_features,
        problem.dtype,
        problem.block_size,
        problem.batch_invariant,
        facts.capability,
    )
    rows, cols = sizes.out_features, sizes.in_features
    if sizes.tokens * rows * cols == 0:
        return EMPTY
    path, not_wgmma = choose_path(sizes), why_not_wgmma(sizes)
    if path == "wgmma":
        tile = choose_wgmma_tile(sizes.tokens, rows, cols, facts.sm_count)
        return f"wgmma: fused, for sm_90a (tiles of {tile.rows} rows by {tile.tokens} tokens)"
    if path == "fused":
        columns = fused_tile_tokens(sizes.tokens)
        passes = -(-sizes.tokens // columns)
        name = "decode" if passes == 1 else f"{passes} passes over the weight"
        splits = choose_splits(rows, cols, facts.sm_count)
        tiles = f"tiles of {TILE_N} rows by {columns} tokens, K in {splits}"
        return f"{name}: fused, mma.sync of sm_80 ({tiles}); not wgmma: {not_wgmma}"
    unable = why_not_fused(sizes)
    if unable:
        reasons = f"neither fused nor wgmma: {unable}"
    else:
        reasons = f"not fused: {why_dense(sizes)}; not wgmma: {not_wgmma}"
    return f"{GEMM}{_adapter(problem)}; {reasons}"


def describe_backward(problem: Problem, facts: DeviceFacts) -> str:
    """`backward_path` on a GPU of these facts. An adapter's dtype is not known here: both are said
    where they differ."""
    if problem.tokens * problem.out_features * problem.in_features == 0:
        return EMPTY
    if problem.op == "quantized_matmul_backward_input" or not problem.rank:
        return GEMM
    ways = {}
    for adapter in dict.fromkeys((torch.float32, problem.dtype)):
        sizes = GradientSizes(
            *(problem.tokens, problem.out_features, problem.rank, problem.dtype, adapter, True)
        )
        ways[str(adapter).removeprefix("torch.")] = choose_gradient_path(sizes, facts.sm_count)
    said = ", ".join(f"{dtype} by {way}" for dtype, way in ways.items())
    return f"{GEMM}, gradients of the adapter's B: {said}"


def _adapter(problem: Problem) -> str:
    """How the GEMM path takes an adapter without dropout."""
    if not problem.rank:
        return ""
    dtype, cols = problem.dtype, problem.in_features
    sizes = GradientSizes(problem.tokens, cols, problem.rank, dtype, dtype, True, False)
    one_pass = cols % 8 == 0 and projects_while_copying(sizes)
    if extends_forward(problem.out_features, cols, one_pass):
        return " over K + R (the adapter as further columns of the weight)"
    return ", and another that adds the adapter"
