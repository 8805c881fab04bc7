"""Subclasses of other libraries' layers whose forward is this library's, where that is the same.

A layer becomes one by a change of its class: nothing is copied, and what the fused path does not
express is left to the layer's own forward. `reason_against` says what that is, for the forward and
for the report alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from qlora_kernels.autograd import lora_linear
from qlora_kernels.autograd.qlora_linear import qlora_linear_of
from qlora_kernels.autograd.quantized_matmul import quantized_linear_of
from qlora_kernels.integrations.bitsandbytes import (
    HELD_OPERANDS,
    layer_operands,
    operands_of,
    quantized_weight_of,
)
from qlora_kernels.integrations.merging import KeptBytes, Requantizing
from qlora_kernels.nn import QuantizedLinear
from qlora_kernels.nn.dora import row_norms, scaled_rows
from qlora_kernels.ops import dequantize


class Fused:
    """Mixin of every fused class; `stock` is the class it stands in for."""

    stock: type[nn.Module]

    def reason_against(self) -> str | None:
        """Why the next call would go to the layer's own forward, or None."""
        raise AssertionError("a fused class says when it applies")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and deep-copies by the stock class's name: this class is made at run time."""
        kept = {name: held for name, held in self.__dict__.items() if name != HELD_OPERANDS}
        return _rebuild, (self.stock,), kept


def _rebuild(stock: type[nn.Module]) -> nn.Module:
    cls = fused_class(stock)
    assert cls is not None
    module: nn.Module = cls.__new__(cls)
    return module


_classes: dict[type, type[nn.Module]] = {}  # stock class -> fused class, one each


def fused_class(stock: type[nn.Module]) -> type[nn.Module] | None:
    """The fused subclass of a layer class, or None where there is none.

    It keeps the name: PEFT and accelerate look for "Linear4bit".
    """
    if stock in _classes:
        return _classes[stock]
    mixin = _mixins().get(stock)
    if mixin is None:
        return None
    attributes = {
        "stock": stock,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    _classes[stock] = type(stock.__name__, (mixin, stock), attributes)
    return _classes[stock]


def _mixins() -> dict[type, type]:
    """Layer class -> mixin, of the packages that are loaded: others have no instances."""
    found: dict[type, type] = {}
    if (layers := sys.modules.get("bitsandbytes.nn.modules")) is not None:
        for name in ("Linear4bit", "LinearFP4", "LinearNF4"):
            found[getattr(layers, name)] = FusedLinear4bit
    if (layers := sys.modules.get("peft.tuners.lora.layer")) is not None:
        found[layers.Linear] = FusedLoRA
    if (layers := sys.modules.get("peft.tuners.lora.bnb")) is not None:
        found[layers.Linear4bit] = FusedLoRA4bit
    return found


def hooked(module: nn.Module) -> str | None:
    """Whether something is to happen around a module's own forward, and what."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "hooks"
    return "a replaced forward" if "forward" in module.__dict__ else None


def reason_against_4bit(layer: Any) -> str | None:
    """Why a bitsandbytes Linear4bit must run as it is, or None."""
    # Not layer.weight, which torch looks for in Python.
    state = getattr(layer._parameters["weight"], "quant_state", None)
    if state is None:
        return "its weight is not quantized yet"
    # Not getattr: what a QuantState has not, it looks for at length.
    if state.__dict__.get("packing_format_for_cpu", False):
        return "its weight was repacked for AVX512-BF16 inference"
    shape = state.shape
    if shape is None or len(shape) != 2:
        return f"its weight has the shape {shape}"
    if shape[0] != layer.out_features or shape[1] != layer.in_features:
        return "its weight is stored transposed"
    return None


def _in_compute_dtype(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """x in the dtype a Linear4bit computes in, chosen as it chooses."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    dtype = layer.compute_dtype
    return x if dtype is None or dtype == x.dtype else x.to(dtype)


def _without_autocast(
    compute: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    """bitsandbytes computes in its layer's dtype whatever autocast says."""
    if not torch.is_autocast_enabled(x.device.type):
        return compute(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return compute(x, *arguments)


class FusedLinear4bit(Fused):
    """bitsandbytes' Linear4bit: no dense weight, forward or backward."""

    def reason_against(self) -> str | None:
        return reason_against_4bit(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self_: Any = self
        weight = self_.weight
        if getattr(weight, "quant_state", None) is None:  # FSDP has made a new parameter of it
            sys.modules["bitsandbytes.nn.modules"].fix_4bit_weight_quant_state_from_module(self)
        if reason_against_4bit(self) is not None:
            stock: torch.Tensor = super().forward(x)  # type: ignore[misc]
            return stock
        y = _without_autocast(
            quantized_linear_of,
            _in_compute_dtype(self, x),
            layer_operands(self),
            self_.bias,
            False,
            "Linear4bit",
        )
        return y if y.dtype == x.dtype else y.to(x.dtype)


def _base_kind(base: nn.Module) -> str | None:
    """What a LoRA layer's base is to the fused path: "4bit", "quantized", "dense", "conv1d"."""
    kind = type(base)
    if isinstance(base, FusedLinear4bit) or kind in _linear4bit_classes():
        return "4bit"
    if kind is QuantizedLinear:
        return "quantized"
    if kind is nn.Linear:
        return "dense"
    return "conv1d" if kind.__name__ == "Conv1D" and hasattr(base, "nf") else None


def _linear4bit_classes() -> tuple[type, ...]:
    layers = sys.modules.get("bitsandbytes.nn.modules")
    return () if layers is None else (layers.Linear4bit, layers.LinearFP4, layers.LinearNF4)


class Parts(NamedTuple):
    """What the fused forward of a LoRA layer takes from it.

    Attributes:
        name: of the active adapter.
        lora_a, lora_b, dropout, base: its modules and the base layer.
        kind: see `_base_kind`.
    """

    name: str
    lora_a: Any
    lora_b: Any
    dropout: Any
    base: Any
    kind: str


def reason_against_lora(layer: Any) -> str | None:
    """Why a PEFT LoRA layer must run as it is, or None: it has exactly one active, plain adapter
    over a base that the fused path knows."""
    parts = parts_of(layer)
    return parts if isinstance(parts, str) else None


def parts_of(layer: Any) -> Parts | str:
    """The parts of a PEFT LoRA layer, or why it must run as it is."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    # Straight from the dicts: this is done on every forward, and attribute look-ups of a module
    # cost more than the rest of it.
    modules = layer._modules
    factors_a, factors_b = modules["lora_A"]._modules, modules["lora_B"]._modules
    names = [name for name in layer.active_adapters if name in factors_a]
    if len(names) != 1:
        return f"{len(names)} active adapters"
    name = names[0]
    lora_a, lora_b = factors_a[name], factors_b[name]
    dropout = modules["lora_dropout"]._modules[name]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return "the adapter's factors are not plain linear layers"
    weight_a = lora_a._parameters["weight"]
    if lora_a._parameters["bias"] is not None or lora_b._parameters["bias"] is not None:
        return "the adapter has a bias"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {type(dropout).__name__}"
    if reason := _reason_against_variant(layer, name):
        return reason
    base = modules["base_layer"]
    for part, what in ((base, "base"), (lora_a, "A"), (lora_b, "B"), (dropout, "dropout")):
        if reason := hooked(part):
            return f"its {what} layer has {reason}"
    weights = (weight_a, base._parameters.get("weight"))
    if any(type(weight).__name__ == "DTensor" for weight in weights):
        return "its parameters are sharded"
    kind = _base_kind(base)
    if kind is None:
        return f"its base layer is a {type(base).__name__}"
    reason = reason_against_4bit(base) if kind == "4bit" else None
    return reason or Parts(name, lora_a, lora_b, dropout, base, kind)


def _reason_against_variant(layer: Any, name: str) -> str | None:
    """DoRA is the one variant with a fused form; its dropout would reach the base's product."""
    if name not in layer.lora_variant:
        return None
    kind = type(layer.lora_variant[name]).__name__
    if kind != "DoraLinearVariant":
        return f"the adapter is a {kind}"
    vector = layer.lora_magnitude_vector[name]
    if reason := hooked(vector):
        return f"its magnitude vector has {reason}"
    dropout = layer.lora_dropout[name]
    return "DoRA with dropout" if type(dropout) is nn.Dropout and dropout.training else None


class FusedLoRA(Requantizing, Fused):
    """PEFT's lora.Linear over a dense weight or over a `QuantizedLinear`."""

    def reason_against(self) -> str | None:
        return reason_against_lora(self)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parts = "it is called with options" if args or kwargs else parts_of(self)
        if isinstance(parts, str):
            stock: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return stock
        return _lora_forward(self, parts, x)


class FusedLoRA4bit(KeptBytes, Fused):
    """PEFT's LoRA over a bitsandbytes Linear4bit."""

    def reason_against(self) -> str | None:
        return reason_against_lora(self)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parts = "it is called with options" if args or kwargs else parts_of(self)
        if isinstance(parts, str):
            stock: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return stock
        return _lora_forward(self, parts, x)


def _lora_forward(layer: Any, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """The fused forward of a layer's parts."""
    name, lora_a, lora_b, dropout, base, kind = parts
    a, b = lora_a._parameters["weight"], lora_b._parameters["weight"]
    scaling, dtype = layer.scaling[name], x.dtype
    dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    vector = layer.lora_magnitude_vector[name] if name in layer.lora_variant else None
    if vector is not None:
        bias = None
    else:
        bias = base._parameters["bias"] if kind in ("4bit", "quantized") else base.bias
    if kind in ("4bit", "quantized"):
        if kind == "4bit":
            weight = base._parameters["weight"]
            fused = isinstance(base, Fused)
            operands = layer_operands(base) if fused else operands_of(weight, weight.quant_state)
            x = _in_compute_dtype(base, x)
            rest = (operands, a, b, scaling, bias, dropout_p, False)
            y = _without_autocast(qlora_linear_of, x, *rest)
        else:
            operands = base.operands()
            y = qlora_linear_of(x, operands, a, b, scaling, bias, dropout_p, base.batch_invariant)
        if vector is not None:
            norms = row_norms(
                _row_squares(base, kind),
                lambda rows: quantized_linear_of(rows, operands, None, False),
                a,
                b,
                scaling,
            )
            y = scaled_rows(y, vector.weight, norms, base.bias)
        return y.to(dtype) if kind == "4bit" and y.dtype != dtype else y
    dense = base.weight.t() if kind == "conv1d" else base.weight
    y = lora_linear(x, dense, a, b, scaling, bias, dropout_p, training=True)
    if vector is not None:
        squares = dense.detach().float().square().sum(dim=1)
        norms = row_norms(squares, lambda rows: rows @ dense.detach().float().t(), a, b, scaling)
        y = scaled_rows(y, vector.weight, norms, base.bias)
    return y


@torch.no_grad()
def _row_squares(base: Any, kind: str) -> torch.Tensor:
    """‖Ŵ_n‖² of a frozen 4-bit weight, fp32 [N]; computed once for the bytes that are there."""
    weight, held = base.weight, base.__dict__.get("_row_squares")
    if torch.compiler.is_compiling():
        return held[2] if held is not None else _squares_of(base, kind)
    # The parameter itself, not its address, which another one may get.
    if held is None or held[0] is not weight or held[1] != weight._version:
        held = base.__dict__["_row_squares"] = (weight, weight._version, _squares_of(base, kind))
    squares: torch.Tensor = held[2]
    return squares.to(weight.device)


def _squares_of(base: Any, kind: str) -> torch.Tensor:
    if kind == "4bit":
        qw = quantized_weight_of(base.weight, base.weight.quant_state)
        dense = dequantize(qw, torch.float32)
    else:
        dense = base.dequantize(torch.float32)
    return dense.square_().sum(dim=1)
