"""qlora_linear and its backward with Triton."""

from __future__ import annotations

import torch

from qlora_kernels.backends.launch_config import (
    choose_path,
    extends_backward,
    extends_forward,
    tile_rank,
)
from qlora_kernels.backends.triton.common import register_triton_kernel
from qlora_kernels.backends.triton.explained import matmul_path
from qlora_kernels.backends.triton.low_rank import (
    down_gradient_launches,
    down_launches,
    run_all,
    up_gradient_launches,
)
from qlora_kernels.backends.triton.quantized_matmul import (
    Down,
    Up,
    dense_weight,
    matmul_rejects,
    product,
    product_backward,
    sizes_of,
)
from qlora_kernels.formats.quantized_weight import WeightOperands


@register_triton_kernel("qlora_linear", rejects=matmul_rejects, path=matmul_path)
def qlora_linear_triton(
    x: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M,N] and xa [M,R]; see `reference.qlora_linear_reference`."""
    x, lora_a, lora_b = x.contiguous(), lora_a.contiguous(), lora_b.contiguous()
    (tokens, cols), rank, rows = x.shape, len(lora_a), len(lora_b)
    if _drops_all(dropout_p, seed) or not tokens * rank * cols:
        xa = x.new_zeros(tokens, rank)
        return product(x, operands, bias, None, batch_invariant), xa
    seed = seed if dropout_p else None
    xa = x.new_empty(tokens, rank)
    path = choose_path(sizes_of(x, operands, batch_invariant))
    if path == "dense" and extends_forward(tokens, rows, cols, rank):
        pad = tile_rank(rank)
        extended = x.new_empty(tokens, cols + pad)
        run_all(down_launches(x, lora_a, dropout_p, seed, xa, extended=extended, scaling=scaling))
        weight = dense_weight(operands, x.dtype, more_cols=pad)
        weight[:, cols : cols + rank] = lora_b
        weight[:, cols + rank :] = 0
        if bias is None:
            return torch.mm(extended, weight.t()), xa
        return torch.addmm(bias.to(x.dtype), extended, weight.t()), xa
    run_all(down_launches(x, lora_a, dropout_p, seed, xa, batch_invariant=batch_invariant))
    return product(x, operands, bias, Up(lora_b, xa, scaling), batch_invariant), xa


@register_triton_kernel("qlora_linear_backward", path=matmul_path)
def qlora_linear_backward_triton(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    xa: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x, grad_a, grad_b, empty where not needed; see `qlora_linear_backward_reference`."""
    grad_y, x, xa = grad_y.contiguous(), x.contiguous(), xa.contiguous()
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    (tokens, cols), rank, rows = x.shape, len(lora_a), len(lora_b)
    if _drops_all(dropout_p, seed) or not tokens * rank * cols * rows:
        return (
            product_backward(grad_y, operands, None) if needs[0] else x.new_empty(0),
            torch.zeros_like(lora_a) if needs[1] else lora_a.new_empty(0),
            torch.zeros_like(lora_b) if needs[2] else lora_b.new_empty(0),
        )
    seed = seed if dropout_p else None
    grad_x, grad_a, grad_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    u = x.new_empty(tokens, rank) if needs[0] or needs[1] else None
    if needs[2]:
        grad_b = torch.empty_like(lora_b)
    # Dropout of u A keeps it apart from the base's gradient: no common GEMM.
    extends = (
        needs[0]
        and seed is None
        and choose_path(sizes_of(grad_y, operands, False)) == "dense"
        and extends_backward(tokens, rows, cols, rank)
    )
    extended = None
    if extends:
        extended = grad_y.new_empty(tokens, rows + tile_rank(rank))
        extended[:, rows + rank :] = 0
    if u is not None or needs[2]:
        run_all(
            up_gradient_launches(
                grad_y, xa, lora_b, scaling, u, grad_b if needs[2] else None, extended=extended
            )
        )
    if needs[1]:
        assert u is not None
        grad_a = torch.empty_like(lora_a)
        run_all(down_gradient_launches(x, u, dropout_p, seed, grad_a))
    if extended is not None:
        weight = dense_weight(operands, x.dtype, more_rows=tile_rank(rank))
        weight[rows : rows + rank] = lora_a
        weight[rows + rank :] = 0
        grad_x = torch.mm(extended, weight)
    elif needs[0]:
        assert u is not None
        grad_x = product_backward(grad_y, operands, Down(lora_a, u, dropout_p, seed))
    return grad_x, grad_a, grad_b


def _drops_all(dropout_p: float, seed: torch.Tensor | None) -> bool:
    return dropout_p == 1.0 and seed is not None
