"""quantized_matmul and its grad_x in CUDA: csrc/kernels/quantized_matmul_sm80.cu, its sibling for
Hopper (wgmma.py), or dequantize and cuBLAS."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qlora_kernels.backends import kept
from qlora_kernels.backends.cuda.common import (
    at_vector,
    contiguous,
    current_stream,
    register_cuda_kernel,
    weight_arguments,
)
from qlora_kernels.backends.cuda.dequantize import dequantize_cuda
from qlora_kernels.backends.cuda.explained import backward_path, forward_path
from qlora_kernels.backends.cuda.low_rank import Projection, run_projection
from qlora_kernels.backends.cuda.matmul_path import (
    MatmulSizes,
    Path,
    choose_path,
    choose_splits,
    matmul_rejects,
)
from qlora_kernels.backends.cuda.scratch import dense_scratch, tickets
from qlora_kernels.backends.cuda.wgmma import choose_wgmma_tile, project_tokens, wgmma_matmul
from qlora_kernels.backends.device import device_facts
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference.dequantize import decode_scales_reference


@register_cuda_kernel("quantized_matmul", rejects=matmul_rejects, path=forward_path)
def quantized_matmul_cuda(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [M,K] times Ŵᵀ plus bias [N]; see `reference.quantized_matmul_reference`."""
    path = choose_path(sizes_of(x, operands, batch_invariant))
    if path != "dense":
        return fused_matmul(x, operands, bias, path=path)
    weight = _dense_weight(x, operands)
    return F.linear(x.detach(), weight, None if bias is None else bias.detach().to(x.dtype))


@register_cuda_kernel("quantized_matmul_backward_input", rejects=matmul_rejects, path=backward_path)
def quantized_matmul_backward_input_cuda(
    grad_y: torch.Tensor, operands: WeightOperands
) -> torch.Tensor:
    """grad_y [M,N] times Ŵ; see `reference.quantized_matmul_backward_input_reference`."""
    weight = kept.given(operands.shape[0], grad_y)
    return grad_y.detach() @ (_dense_weight(grad_y, operands) if weight is None else weight)


def _dense_weight(like: torch.Tensor, operands: WeightOperands) -> torch.Tensor:
    """Ŵ [N,K] of like's dtype, in scratch unless it is to be kept."""
    rows, cols = operands.shape
    if not kept.is_wanted():
        return dequantize_cuda(
            operands, operands.shape, like.dtype, dense_scratch(rows, cols, like)
        )
    weight = dequantize_cuda(operands, operands.shape, like.dtype, like.new_empty(rows, cols))
    kept.leave(weight)
    return weight


def sizes_of(x: torch.Tensor, operands: WeightOperands, batch_invariant: bool) -> MatmulSizes:
    """The sizes of a product with x [M,K]."""
    rows, cols = operands.shape
    capability = device_facts(x.device).capability if x.is_cuda else 0
    return MatmulSizes(
        len(x), rows, cols, x.dtype, operands.block_size, batch_invariant, capability
    )


def for_fused_matmul(operands: WeightOperands) -> WeightOperands:
    """The weight as the kernel reads it: codes at a 16-byte boundary, and second-level scales for a
    power of two of scales each. Others, which no registered format has, are decoded beforehand."""
    codes, group = at_vector(operands.codes), operands.scale_block_size
    if operands.absmax is not None or group & (group - 1) == 0:
        return operands._replace(codes=codes)
    return operands._replace(
        codes=codes,
        absmax=decode_scales_reference(operands),
        scale_codes=None,
        scale_absmax=None,
        scale_offset=None,
        scale_codebook=None,
    )


def fused_matmul(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 0.0,
    projection: Projection | None = None,
    path: Path = "fused",
) -> torch.Tensor:
    """y [M,N] = x Ŵᵀ + scaling·xa lora_bᵀ + bias by a fused kernel; xa [M,R] of x's dtype. With a
    projection, whose result xa is or is a part of, that is launched first."""
    tokens, (rows, cols) = len(x), operands.shape
    y = x.new_empty(tokens, rows)
    if tokens * rows == 0:
        if projection is not None:
            run_projection(projection)
        return y
    sm_count = device_facts(x.device).sm_count
    if path == "wgmma":
        if projection is not None:
            project_tokens(projection)
        tile = choose_wgmma_tile(tokens, rows, cols, sm_count)
        weight = for_fused_matmul(operands)
        return wgmma_matmul(at_vector(x), weight, bias, xa, lora_b, scaling, y, tile)
    splits = choose_splits(rows, cols, sm_count)
    ops = torch.ops.qlora_kernels_cuda
    partials = counters = None
    if splits > 1:
        partials = x.new_empty(
            ops.fused_matmul_partials.default(tokens, rows, splits), dtype=torch.float32
        )
        counters = tickets(ops.fused_matmul_tiles.default(tokens, rows), x)
    operands = for_fused_matmul(operands)
    ops.fused_matmul.default(
        at_vector(x),
        *weight_arguments(operands, rows, cols),
        None if bias is None else contiguous(bias.detach()),
        xa,
        None if lora_b is None else contiguous(lora_b.detach()),
        scaling,
        y,
        splits,
        partials,
        counters,
        *(projection or (None, None, None)),
        current_stream(x),
    )
    return y
