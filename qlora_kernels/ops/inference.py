"""An inference call in one piece: no dispatcher, no registry, no allocation in Python.

The ops check, choose and allocate in about 60 µs when the weight of the layer before has pushed
Python out of the caches, and one token's product takes 400. Where nothing needs them, the kernel is
called as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_kernels.backends.cpu.inference import native_linear
from qlora_kernels.backends.registry import generation, nothing_forced
from qlora_kernels.formats.quantized_weight import QuantizedWeight, WeightOperands
from qlora_kernels.ops.library import runs_eagerly


def held_operands(qw: object) -> WeightOperands | None:
    """The operands that a 2-D weight keeps since they were first asked for, or None."""
    if torch.compiler.is_compiling() or type(qw) is not QuantizedWeight:
        return None
    held: WeightOperands | None = qw.__dict__.get("_operands")
    return held if held is not None and len(held.shape) == 2 else None


def run_inference(
    x: torch.Tensor,
    weight: tuple[Any, ...],
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor | None:
    """y [..., N] of x [..., K] and a plain weight, or None where that takes the ops.

    That is where gradients, autocast, tracing or a forced backend are on, for tensors of another
    device, dtype or layout than the kernel takes, for many tokens, and for what the ops refuse.

    Args:
        weight: the fields of a `WeightOperands`, fp32 ones as their int32 bits if need be.
    """
    if torch.is_grad_enabled() or not runs_eagerly(x) or torch.is_autocast_enabled("cpu"):
        return None
    native = native_linear(generation())
    if native is None or not nothing_forced():
        return None
    op, dot_tokens, tile_tokens, isa, usual_map = native
    *tensors, scale_codebook, (rows, cols), block_size, scale_block_size = weight
    if scale_codebook is None and tensors[1] is None:
        scale_codebook = usual_map
    y: torch.Tensor | None = op(
        x,
        *tensors,
        scale_codebook,
        rows,
        cols,
        block_size,
        scale_block_size,
        bias,
        lora_a,
        lora_b,
        scaling,
        dot_tokens,
        tile_tokens,
        isa,
    )
    return y
