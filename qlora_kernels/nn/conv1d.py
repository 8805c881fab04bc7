"""transformers' Conv1D, a linear layer that stores its weight as [in_features, out_features]."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is one; transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is an nn.Linear, or what `as_linear` makes one of."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def as_linear(module: Any) -> nn.Linear:
    """A linear layer as nn.Linear; one made of a Conv1D shares its memory."""
    if isinstance(module, nn.Linear):
        return module
    inputs, outputs = module.weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    linear.register_parameter("bias", module.bias)
    return linear.train(module.training)
