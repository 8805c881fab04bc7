"""An inference call in one piece: one native op, no registry, no allocation in Python.

The ops check, choose and allocate in about 60 µs when the weight of the layer before has pushed
Python out of the caches, and one token's product takes 400. Where nothing needs them, the kernel is
called as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state
from torch.compiler import is_dynamo_compiling

from qlora_kernels.backends.cpu.inference import native_linear
from qlora_kernels.backends.registry import nothing_forced
from qlora_kernels.formats.quantized_weight import QuantizedWeight


def run_inference(
    x: Tensor,
    weight: QuantizedWeight | tuple[Any, ...],
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor | None:
    """y [..., N] of x [..., K] and a plain weight, or None where that takes the ops.

    That is where gradients, autocast, tracing or a forced backend are on, for tensors of another
    device, dtype or layout than the kernel takes, for many tokens, and for what the ops refuse.

    Args:
        weight: a weight whose operands were asked for before, or `flat` operands, fp32 ones as
            their int32 bits if need be.
    """
    # What is not asked here is left to torch's dispatcher, which asks it anyway: dispatch modes,
    # torch.func, autocast; see the binding.
    if is_dynamo_compiling() or type(x) is not Tensor or is_grad_enabled():
        return None
    flat: Any = weight if isinstance(weight, tuple) else weight.__dict__.get("_flat")
    if flat is None:
        return None
    native = native_linear()
    if native is None or not nothing_forced() or _get_tracing_state() is not None:
        return None
    op, dot_tokens, tile_tokens, isa = native
    y: Tensor | None = op(x, *flat, bias, lora_a, lora_b, scaling, dot_tokens, tile_tokens, isa)
    return y
