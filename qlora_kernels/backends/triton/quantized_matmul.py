"""quantized_matmul and its grad_x with Triton; the products with Ŵ that qlora_linear shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qlora_kernels import env
from qlora_kernels.backends.device import device_facts
from qlora_kernels.backends.launch_config import (
    MatmulConfig,
    MatmulSizes,
    backward_config,
    choose_path,
    few_tokens_config,
    forward_config,
    tile_rank,
    why_not_fused,
)
from qlora_kernels.backends.registry import Problem
from qlora_kernels.backends.triton.common import (
    at_word,
    ceil_div,
    contiguous,
    next_power_of_two,
    register_triton_kernel,
    triton_rejects,
    weight_arguments,
)
from qlora_kernels.backends.triton.dequantize import dequantize_launch
from qlora_kernels.backends.triton.dropout import dropout_arguments, dropout_triton
from qlora_kernels.backends.triton.explained import matmul_path
from qlora_kernels.backends.triton.launch import Launch
from qlora_kernels.backends.triton.low_rank import reduce_launch, run_all
from qlora_kernels.formats.quantized_weight import WeightOperands

# Ranks of each batch of the product for few tokens: the least that tl.dot takes.
_FEW_TILE_R = 16
# Of the product with one token in fp32: a thread decodes 128 codes an iteration.
_ONE_TILE_N, _ONE_TILE_K = 16, 1024


class Up(NamedTuple):
    """The adapter's second factor in the forward: scaling·xa Bᵀ, xa [M,R], lora_b [N,R]."""

    lora_b: torch.Tensor
    xa: torch.Tensor
    scaling: float


class Down(NamedTuple):
    """The adapter's part of grad_x: dropout(u A), u [M,R], lora_a [R,K]; seed None: no dropout."""

    lora_a: torch.Tensor
    u: torch.Tensor
    dropout_p: float
    seed: torch.Tensor | None


def matmul_rejects(problem: Problem) -> str | None:
    """Beside device and dtype: a batch-invariant product must be one that the fused kernel takes,
    or empty."""
    reason = _device_rejects(problem)
    if reason is None and problem.batch_invariant:
        sizes = MatmulSizes(
            1, 1, problem.in_features or 64, problem.dtype, problem.block_size, True
        )
        reason = why_not_fused(sizes)
    return reason


_device_rejects = triton_rejects()


@register_triton_kernel("quantized_matmul", rejects=matmul_rejects, path=matmul_path)
def quantized_matmul_triton(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [M,K] times Ŵᵀ plus bias [N]; see `reference.quantized_matmul_reference`."""
    return product(x.contiguous(), operands, bias, None, batch_invariant)


@register_triton_kernel("quantized_matmul_backward_input", path=matmul_path)
def quantized_matmul_backward_input_triton(
    grad_y: torch.Tensor, operands: WeightOperands
) -> torch.Tensor:
    """grad_y [M,N] times Ŵ; see `reference.quantized_matmul_backward_input_reference`."""
    return product_backward(grad_y.contiguous(), operands, None)


def sizes_of(x: torch.Tensor, operands: WeightOperands, batch_invariant: bool) -> MatmulSizes:
    """What the choice of a path sees; x (or grad_y) has one row a token."""
    rows, cols = operands.shape
    return MatmulSizes(len(x), rows, cols, x.dtype, operands.block_size, batch_invariant)


def product(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None,
    up: Up | None,
    batch_invariant: bool,
) -> torch.Tensor:
    """x Ŵᵀ + scaling·xa Bᵀ + bias, [M,N] in x's dtype; x contiguous."""
    sizes = sizes_of(x, operands, batch_invariant)
    path = choose_path(sizes)
    if not sizes.tokens:
        return x.new_empty(0, sizes.out_features)
    if path == "dense":
        return _dense_product(x, operands, bias, up)
    y = x.new_empty(sizes.tokens, sizes.out_features)
    if path == "one_token":
        one_token_launch(x, operands, bias, up, y).run()
    elif path == "few_tokens":
        config = few_tokens_config(sizes, device_facts(x.device))
        run_all(few_tokens_launches(x, operands, bias, up, y, config))
    else:
        config = _runnable(forward_config(sizes, device_facts(x.device)))
        run_all(forward_launches(x, operands, bias, up, y, config))
    return y


def product_backward(
    grad_y: torch.Tensor,
    operands: WeightOperands,
    down: Down | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """grad_y Ŵ + dropout(u A), [M,K] in grad_y's dtype; grad_y contiguous. Added to `out` if given:
    projections that share x have one grad_x."""
    sizes = sizes_of(grad_y, operands, False)
    if not sizes.tokens:
        return grad_y.new_empty(0, sizes.in_features) if out is None else out
    if choose_path(sizes) == "dense":
        return _dense_backward(grad_y, operands, down, out)
    grad_x = grad_y.new_empty(sizes.tokens, sizes.in_features) if out is None else out
    config = _runnable(backward_config(sizes, device_facts(grad_y.device)))
    backward_launch(grad_y, operands, down, grad_x, config, accumulate=out is not None).run()
    return grad_x


def _runnable(config: MatmulConfig) -> MatmulConfig:
    """The interpreter has no inline PTX, and is slow at what stands for it."""
    return replace(config, decode="gather") if env.triton_interpret() else config


def forward_launches(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None,
    up: Up | None,
    y: torch.Tensor,
    config: MatmulConfig,
) -> list[Launch]:
    """The fused forward, with a reduction where several programs share a sum over K."""
    name = "quantized_matmul._fused_forward_kernel"
    own = {"TILE_R": tile_rank(up.xa.shape[1]) if up else 0, "DECODE": config.decode}
    return _split_launches(name, x, operands, bias, up, y, config, own)


def few_tokens_launches(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None,
    up: Up | None,
    y: torch.Tensor,
    config: MatmulConfig,
) -> list[Launch]:
    """The product for few tokens, fp16 or bf16, with a reduction as above."""
    own = {"TILE_R": _FEW_TILE_R if up else 0, "STAGES": config.num_stages}
    name = "few_tokens._few_tokens_kernel"
    return _split_launches(name, x, operands, bias, up, y, config, own)


def _split_launches(
    name: str,
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None,
    up: Up | None,
    y: torch.Tensor,
    config: MatmulConfig,
    own_arguments: dict[str, Any],
) -> list[Launch]:
    (tokens, cols), rows = x.shape, operands.shape[0]
    tiles = ceil_div(cols, config.tile_k)
    per_split = ceil_div(tiles, config.splits)
    splits = ceil_div(tiles, per_split)
    out = y if splits == 1 else y.new_empty(splits, tokens, rows, dtype=torch.float32)
    arguments = _forward_arguments(x, operands, bias if splits == 1 else None, up, out)
    arguments |= {
        "M": tokens,
        "tiles_per_split": per_split,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "TILE_K": config.tile_k,
        "EVEN_K": cols % config.tile_k == 0,
    }
    arguments |= own_arguments
    grid = (ceil_div(rows, config.tile_n), ceil_div(tokens, config.tile_m), splits)
    launches = [Launch(name, grid, arguments, config.num_warps, config.num_stages)]
    if splits > 1:
        launches.append(reduce_launch(out, y, bias=bias))
    return launches


def one_token_launch(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None,
    up: Up | None,
    y: torch.Tensor,
) -> Launch:
    """y [1, N] of x [1, K]."""
    cols = x.shape[1]
    tile_k = min(_ONE_TILE_K, next_power_of_two(cols))
    arguments = _forward_arguments(x, operands, bias, up, y)
    arguments |= {
        "TILE_N": _ONE_TILE_N,
        "TILE_K": tile_k,
        # The epilogue holds all of R at once.
        "TILE_R": next_power_of_two(up.xa.shape[1]) if up else 0,
        "EVEN_K": cols % tile_k == 0,
        "STAGES": 3,
    }
    grid = (ceil_div(operands.shape[0], _ONE_TILE_N),)
    return Launch("quantized_matmul._one_token_kernel", grid, arguments)


def backward_launch(
    grad_y: torch.Tensor,
    operands: WeightOperands,
    down: Down | None,
    grad_x: torch.Tensor,
    config: MatmulConfig,
    accumulate: bool = False,
) -> Launch:
    """The fused grad_x."""
    tokens, (rows, cols) = len(grad_y), operands.shape
    arguments: dict[str, Any] = _weight_arguments(operands)
    arguments |= dropout_arguments(*((down.dropout_p, down.seed) if down else (0.0, None)))
    arguments |= {
        "grad_y_ptr": grad_y,
        "lora_a_ptr": down.lora_a if down else None,
        "u_ptr": down.u if down else None,
        "grad_x_ptr": grad_x,
        "M": tokens,
        "N": rows,
        "K": cols,
        "R": down.u.shape[1] if down else 0,
        "codes_stride": cols // 2,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "TILE_K": config.tile_k,
        "TILE_R": tile_rank(down.u.shape[1]) if down else 0,
        "EVEN_K": cols % config.tile_k == 0,
        "ACCUMULATE": accumulate,
        "DECODE": config.decode,
    }
    grid = (ceil_div(cols, config.tile_k), ceil_div(tokens, config.tile_m))
    kernel = "quantized_matmul_backward._fused_backward_kernel"
    return Launch(kernel, grid, arguments, config.num_warps, config.num_stages)


def dense_weight(
    operands: WeightOperands, dtype: torch.dtype, more_rows: int = 0, more_cols: int = 0
) -> torch.Tensor:
    """Ŵ in the corner of an otherwise undefined [N + more_rows, K + more_cols].

    The memory comes from torch's allocator, which hands the same block out call after call and
    keeps streams and CUDA graphs apart; a buffer of our own would have to do that again.
    """
    rows, cols = operands.shape
    scratch = operands.codes.new_empty(rows + more_rows, cols + more_cols, dtype=dtype)
    corner = scratch[:rows, :cols]
    if corner.numel():
        whole = corner.view(1, -1) if not more_cols else corner
        dequantize_launch(operands, whole).run()
    return scratch


def _dense_product(
    x: torch.Tensor, operands: WeightOperands, bias: torch.Tensor | None, up: Up | None
) -> torch.Tensor:
    """Ŵ to scratch, then torch's GEMM on top of the adapter's term and the bias."""
    weight = dense_weight(operands, x.dtype).t()
    start = None if bias is None else bias.to(x.dtype)
    if up:
        lora_b = up.lora_b.to(x.dtype).t()
        if start is None:
            start = torch.mm(up.xa, lora_b).mul_(up.scaling)
        else:
            start = torch.addmm(start, up.xa, lora_b, alpha=up.scaling)
        return start.addmm_(x, weight)
    return torch.mm(x, weight) if start is None else torch.addmm(start, x, weight)


def _dense_backward(
    grad_y: torch.Tensor, operands: WeightOperands, down: Down | None, out: torch.Tensor | None
) -> torch.Tensor:
    weight = dense_weight(operands, grad_y.dtype)
    if down:
        through_adapter = torch.mm(down.u, down.lora_a.to(grad_y.dtype))
        through_adapter = dropout_triton(through_adapter, down.dropout_p, down.seed)
        out = through_adapter if out is None else out.add_(through_adapter)
    return torch.mm(grad_y, weight) if out is None else out.addmm_(grad_y, weight)


def _weight_arguments(operands: WeightOperands) -> dict[str, Any]:
    """The products read codes in words of four bytes."""
    arguments = weight_arguments(operands)
    return arguments | {"codes_ptr": at_word(arguments["codes_ptr"])}


def _forward_arguments(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None,
    up: Up | None,
    y: torch.Tensor,
) -> dict[str, Any]:
    rows, cols = operands.shape
    return _weight_arguments(operands) | {
        "x_ptr": x,
        "lora_b_ptr": contiguous(up.lora_b) if up else None,
        "xa_ptr": up.xa if up else None,
        "bias_ptr": contiguous(bias),
        "y_ptr": y,
        "N": rows,
        "K": cols,
        "R": up.xa.shape[1] if up else 0,
        "codes_stride": cols // 2,
        "scaling": up.scaling if up else 1.0,
    }
