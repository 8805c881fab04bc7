"""transformers' fused expert modules as `QuantizedExperts`, by a change of class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.nn import QuantizedExperts

_classes: dict[type, type] = {}  # expert class -> its quantized subclass


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts as 3-D parameters, as transformers 5 does."""
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3 and hasattr(module, "num_experts")


def why_not_experts(module: Any) -> str | None:
    """Why an expert module stays dense, or None: its forward is the plain one, over [N, K]."""
    if isinstance(module, QuantizedExperts):
        return "quantized already"
    if not hasattr(module, "has_gate"):
        return "its forward is its own"
    if module.is_transposed:
        return "its matrices are stored transposed"
    if module.has_bias:
        return "its experts have biases"
    if module.has_post_expert_norm:
        return "its experts have norms"
    return None


def projections_of(module: Any) -> tuple[str, str]:
    """Names of an expert module's projections."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def make_quantized(module: Any, fmt: Format, dtype: torch.dtype) -> None:
    """Turn an expert module into a quantized one without values, in place, to be loaded into."""
    cls = type(module)
    if cls not in _classes:
        attributes = {"stock": cls, "__module__": cls.__module__}
        _classes[cls] = type(f"Quantized{cls.__name__}", (QuantizedExperts, cls), attributes)
    shapes = {name: tuple(getattr(module, name).shape) for name in projections_of(module)}
    module.__class__ = _classes[cls]
    for name, (experts, rows, cols) in shapes.items():
        empty = QuantizedWeight.empty((rows, cols), dtype, fmt)
        module.hold(name, [empty] * experts)
    module._is_hf_initialized = True  # nothing of it is to be drawn at random


def make_dense(module: Any, dtype: torch.dtype | None) -> None:
    """Undo `make_quantized`, with the dequantized values."""
    dense = {name: module.dequantize(name, dtype) for name in module.projections}
    for name in list(module._parameters):
        if name.startswith(tuple(dense)):
            del module._parameters[name]
    module.__class__ = module.stock
    del module.__dict__["projections"]
    for name, stack in dense.items():
        module.register_parameter(name, nn.Parameter(stack, requires_grad=False))


def converts_experts(conversion: Any, names: Sequence[str]) -> bool:
    """Whether a weight conversion makes one of these projections out of single experts' matrices:
    quantized stacks are saved as they are."""
    targets = getattr(conversion, "_original_target_patterns", ())
    return hasattr(conversion, "operations") and any(
        target.rpartition(".")[2] == name for target in targets for name in names
    )
