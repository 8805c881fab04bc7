"""initialize_adapters: LoftQ, QPiSSA or QERA for every adapted layer of a model, ours or PEFT's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora_kernels.errors import argument_error
from qlora_kernels.nn import QLoRALinear, QuantizedLinear
from qlora_kernels.nn.initialization import InputMoments, input_moments, set_start, start

_PREFIX = "base_model.model."


def calibrate(model: nn.Module, exact: bool = False) -> Any:
    """Measure, in a `with` block, what the adapted layers of a model are given.

    Args:
        model: with `QLoRALinear` layers, or PEFT's LoRA over `QuantizedLinear`.
        exact: keep the whole E[x xᵀ] of a layer, [K, K], and not only its diagonal [K].

    Returns:
        A context manager whose value's `moments()` goes to `initialize_adapters`.
    """
    return _named(model, exact)


@contextmanager
def _named(model: nn.Module, exact: bool) -> Iterator[InputMoments]:
    layers = dict(_adapted(model))
    if not layers:
        raise argument_error("calibrate", "model", "one with adapters over 4-bit layers", "none")
    with input_moments(layers, exact) as found:
        yield found


@torch.no_grad()
def initialize_adapters(
    model: nn.Module,
    dense: Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor],
    method: str = "loftq",
    *,
    steps: int = 1,
    moments: Mapping[str, torch.Tensor] | None = None,
    adapter: str = "default",
) -> dict[str, tuple[float, float]]:
    """Start every adapter where it makes up for what quantization lost; layer by layer.

    Args:
        model: with `QLoRALinear` layers, or PEFT's LoRA over `QuantizedLinear`; changed in place.
        dense: the weights before quantization, by name ("layers.0.q_proj.weight"), or a function
            of the name that loads one.
        method: "loftq", "qpissa" (which changes the stored base) or "qera".
        steps: alternations of loftq and qpissa.
        moments: for qera, from `calibrate`.
        adapter: the PEFT adapter that is initialised.

    Returns:
        Layer name -> ‖W − q(W)‖ / ‖W‖ before, and ‖W − Q − scaling·B A‖ / ‖W‖ after.

    Raises:
        ArgumentError: a model without such layers, a weight that is missing or of another shape,
            a layer without moments, an unknown method.
    """
    load = dense if callable(dense) else dense.get
    report: dict[str, tuple[float, float]] = {}
    for name, layer in _adapted(model):
        weight = load(f"{name}.weight")
        base: Any = layer if isinstance(layer, QLoRALinear) else layer.get_base_layer()
        if weight is None or tuple(weight.shape) != base.weight_shape:
            got = None if weight is None else list(weight.shape)
            raise argument_error(
                "initialize_adapters", f"dense[{name}.weight]", f"{list(base.weight_shape)}", got
            )
        weight = weight.to(base.weight.device)
        if isinstance(layer, QLoRALinear):
            rank, scaling = layer.rank, layer.scaling
        else:
            rank, scaling = layer.r[adapter], layer.scaling[adapter]
        held = None if moments is None else moments.get(name)
        begin = start(method, weight, rank, scaling, base.format, steps, held)
        before = _distance(weight, base.dequantize(torch.float32))
        if isinstance(layer, QLoRALinear):
            set_start(layer, begin)
        else:
            base.set_quantized_weight(begin.qw)
            layer.lora_A[adapter].weight.data.copy_(begin.lora_a)
            layer.lora_B[adapter].weight.data.copy_(begin.lora_b)
        product = scaling * (begin.lora_b @ begin.lora_a)
        report[name] = (before, _distance(weight, base.dequantize(torch.float32) + product))
    if not report:
        raise argument_error(
            "initialize_adapters", "model", "one with adapters over 4-bit layers", 0
        )
    return report


def _distance(weight: torch.Tensor, other: torch.Tensor) -> float:
    return float((weight.float() - other).norm() / weight.float().norm())


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names, as the dense model has them, and layers."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    for name, module in model.named_modules():
        ours = isinstance(module, QLoRALinear)
        if not ours and lora is not None and isinstance(module, lora.LoraLayer):
            ours = type(module.get_base_layer()) is QuantizedLinear
        if ours:
            yield name.removeprefix(_PREFIX), module
