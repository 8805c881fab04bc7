"""Launches of an adapter's thin products (kernels/low_rank.py); used by qlora_linear."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qlora_kernels.backends.device import device_facts
from qlora_kernels.backends.launch_config import (
    down_config,
    down_gradient_config,
    up_gradients_config,
)
from qlora_kernels.backends.triton.common import ceil_div
from qlora_kernels.backends.triton.dropout import dropout_arguments
from qlora_kernels.backends.triton.launch import Launch

_REDUCE_TILE = 1024


def run_all(launches: Iterable[Launch]) -> None:
    """Run launches in order."""
    for launch in launches:
        launch.run()


def reduce_launch(
    partials: torch.Tensor, out: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None
) -> Launch:
    """out [rows, cols] = scale·(sum of partials [parts, rows, cols] in order) + bias [cols]."""
    rows, cols = out.shape
    arguments = {
        "partials_ptr": partials,
        "bias_ptr": bias,
        "out_ptr": out,
        "cols": cols,
        "out_pitch": out.stride(0),
        "count": rows * cols,
        "scale": scale,
        "PARTS": partials.shape[0],
        "TILE": _REDUCE_TILE,
    }
    return Launch("low_rank._reduce_kernel", (ceil_div(rows * cols, _REDUCE_TILE),), arguments)


def down_launches(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    xa: torch.Tensor,
    *,
    extended: torch.Tensor | None = None,
    scaling: float = 1.0,
    batch_invariant: bool = False,
) -> list[Launch]:
    """xa [M,R] = dropout(x) Aᵀ, rounded to x's dtype.

    Args:
        extended: [M, K + tile of R] to fill with [x | scaling·xa | 0], or None.
        batch_invariant: whether a row's bits may not depend on M.
    """
    (tokens, cols), rank = x.shape, len(lora_a)
    config = down_config(tokens, cols, rank, device_facts(x.device), batch_invariant)
    splits = 1 if extended is not None else config.parts
    per_split = ceil_div(ceil_div(cols, splits), config.tile_cols) * config.tile_cols
    splits = ceil_div(cols, per_split)
    out = xa if splits == 1 else xa.new_empty(splits, tokens, rank, dtype=torch.float32)
    arguments = {
        "x_ptr": x,
        "lora_a_ptr": lora_a,
        "out_ptr": out,
        "copy_ptr": extended,
        "M": tokens,
        "K": cols,
        "R": rank,
        "copy_pitch": 0 if extended is None else extended.stride(0),
        "cols_per_split": per_split,
        "scaling": scaling,
        "TILE_M": config.tile_rows,
        "TILE_K": config.tile_cols,
        "TILE_R": config.tile_rank,
        "ALIGNED": cols % 4 == 0,
        "EVEN_K": cols % config.tile_cols == 0,
    }
    arguments |= dropout_arguments(dropout_p, seed)
    grid = (ceil_div(tokens, config.tile_rows), splits, ceil_div(rank, config.tile_rank))
    num_warps = _warps(cols, seed)
    launches = [Launch("low_rank._down_kernel", grid, arguments, num_warps)]
    if splits > 1:
        launches.append(reduce_launch(out, xa))
    return launches


def up_gradient_launches(
    grad_y: torch.Tensor,
    xa: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    u: torch.Tensor | None,
    grad_b: torch.Tensor | None,
    *,
    extended: torch.Tensor | None = None,
) -> list[Launch]:
    """u [M,R] = scaling·grad_y B in grad_y's dtype and grad_b [N,R] = scaling·grad_yᵀ xa, either
    of them None if not needed.

    Args:
        extended: [M, N + R or more]: grad_y is copied there, and u behind it if it is needed.
    """
    (tokens, cols), rank = grad_y.shape, lora_b.shape[1]
    config = up_gradients_config(tokens, cols, rank, device_facts(grad_y.device))
    per_slice = ceil_div(ceil_div(tokens, config.parts), config.tile_rows) * config.tile_rows
    slices, tiles = ceil_div(tokens, per_slice), ceil_div(cols, config.tile_cols)
    wide = torch.float32
    u_parts = None if u is None else grad_y.new_empty(tiles, tokens, rank, dtype=wide)
    b_parts = None if grad_b is None else grad_y.new_empty(slices, cols, rank, dtype=wide)
    arguments = {
        "grad_y_ptr": grad_y,
        "lora_b_ptr": lora_b,
        "xa_ptr": xa,
        "u_parts_ptr": u_parts,
        "b_parts_ptr": b_parts,
        "copy_ptr": extended,
        "M": tokens,
        "N": cols,
        "R": rank,
        "copy_pitch": 0 if extended is None else extended.stride(0),
        "rows_per_slice": per_slice,
        "TILE_M": config.tile_rows,
        "TILE_N": config.tile_cols,
        "TILE_R": config.tile_rank,
        "NEED_U": u is not None,
        "NEED_B": grad_b is not None,
    }
    grid = (tiles, slices, ceil_div(rank, config.tile_rank))
    launches = [Launch("low_rank._up_gradients_kernel", grid, arguments)]
    if u_parts is not None and u is not None:
        launches.append(reduce_launch(u_parts, u, scaling))
        if extended is not None:
            launches.append(reduce_launch(u_parts, extended[:, cols : cols + rank], scaling))
    if b_parts is not None and grad_b is not None:
        launches.append(reduce_launch(b_parts, grad_b, scaling))
    return launches


def down_gradient_launches(
    x: torch.Tensor,
    u: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    grad_a: torch.Tensor,
) -> list[Launch]:
    """grad_a [R,K] = uᵀ dropout(x)."""
    (tokens, cols), rank = x.shape, u.shape[1]
    config = down_gradient_config(tokens, cols, rank, device_facts(x.device))
    per_slice = ceil_div(ceil_div(tokens, config.parts), config.tile_rows) * config.tile_rows
    slices = ceil_div(tokens, per_slice)
    a_parts = x.new_empty(slices, rank, cols, dtype=torch.float32)
    arguments = {
        "x_ptr": x,
        "u_ptr": u,
        "a_parts_ptr": a_parts,
        "M": tokens,
        "K": cols,
        "R": rank,
        "rows_per_slice": per_slice,
        "TILE_M": config.tile_rows,
        "TILE_K": config.tile_cols,
        "TILE_R": config.tile_rank,
        "ALIGNED": cols % 4 == 0,
    }
    arguments |= dropout_arguments(dropout_p, seed)
    grid = (ceil_div(cols, config.tile_cols), slices, ceil_div(rank, config.tile_rank))
    return [
        Launch("low_rank._down_gradient_kernel", grid, arguments, _warps(cols, seed)),
        reduce_launch(a_parts, grad_a),
    ]


def _warps(cols: int, seed: torch.Tensor | None) -> int:
    """Rows that are no multiple of 4 make every element compute four words of dropout, which takes
    more registers than four warps have for a tile."""
    return 4 if seed is None or cols % 4 == 0 else 16
