"""transformers' fused expert modules as `QuantizedExperts`, by a change of class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.nn import QuantizedExperts
from qlora_kernels.nn.quantized_experts import QuantizedBatchedExperts

_classes: dict[type, type] = {}  # expert class -> its quantized subclass
# Classes that get each token once an expert; they store [K, N] and do not say so.
_BATCHED = ("Llama4TextExperts",)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts as 3-D parameters, as transformers 5 does."""
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3 and hasattr(module, "num_experts")


def why_not_experts(module: Any) -> str | None:
    """Why an expert module stays dense, or None: its forward is one of those that are known."""
    if isinstance(module, QuantizedExperts):
        return "quantized already"
    if type(module).__name__ in _BATCHED:
        return None
    if not hasattr(module, "has_gate"):
        return "its forward is its own"
    if module.has_post_expert_norm:
        return "its experts have norms"
    return None


def projections_of(module: Any) -> tuple[str, str]:
    """Names of an expert module's projections."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


def make_quantized(module: Any, fmt: Format, dtype: torch.dtype) -> Callable[[], None]:
    """Turn an expert module into a quantized one without values, in place, to be loaded into.

    Returns:
        What makes it the dense one again that it was.
    """
    cls, names = type(module), projections_of(module)
    is_batched = cls.__name__ in _BATCHED
    if cls not in _classes:
        mixin = QuantizedBatchedExperts if is_batched else QuantizedExperts
        attributes = {"stock": cls, "__module__": cls.__module__}
        _classes[cls] = type(f"Quantized{cls.__name__}", (mixin, cls), attributes)
    dense = {name: getattr(module, name) for name in names}
    module.__class__ = _classes[cls]
    # PEFT looks for is_transposed, and lays out its factors by it.
    module.source_is_transposed = is_batched or module.is_transposed
    for name, stack in dense.items():
        experts, rows, cols = stack.shape
        if module.source_is_transposed:
            rows, cols = cols, rows
        empty = QuantizedWeight.empty((rows, cols), dtype, fmt)
        module.hold(name, [empty] * experts)
    module._is_hf_initialized = True  # nothing of it is to be drawn at random

    def undo() -> None:
        _replace_stacks(module, dense)
        del module._is_hf_initialized

    return undo


def make_dense(module: Any, dtype: torch.dtype | None) -> None:
    """Undo `make_quantized`, with the dequantized values."""
    dense = {name: module.dequantize(name, dtype) for name in module.projections}
    if module.source_is_transposed:
        dense = {name: stack.transpose(1, 2).contiguous() for name, stack in dense.items()}
    frozen = {name: nn.Parameter(stack, requires_grad=False) for name, stack in dense.items()}
    _replace_stacks(module, frozen)


def stored_parameters(module: QuantizedExperts) -> list[str]:
    """Names of the parameters that a module's quantized stacks are."""
    return [
        name
        for name in module._parameters
        if name.startswith(tuple(module.projections)) and not name.endswith("_bias")
    ]


def _replace_stacks(module: Any, dense: dict[str, nn.Parameter]) -> None:
    for name in stored_parameters(module):
        del module._parameters[name]
    module.__class__ = module.stock
    del module.__dict__["projections"], module.__dict__["source_is_transposed"]
    for name, stack in dense.items():
        module.register_parameter(name, stack)


def converts_experts(conversion: Any, names: Sequence[str]) -> bool:
    """Whether a weight conversion makes one of these projections out of single experts' matrices:
    quantized stacks are saved as they are."""
    targets = getattr(conversion, "_original_target_patterns", ())
    return hasattr(conversion, "operations") and any(
        target.rpartition(".")[2] == name for target in targets for name in names
    )
