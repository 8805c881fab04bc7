"""PEFT's tuners other than LoRA over `QuantizedLinear`: IA3, OFT, VeRA, LoHa and so on; and LoRA
over `QuantizedEmbedding`.

They are written for a layer whose `weight` is the matrix. So they get one for as long as they need
it: while they are made, while they merge, and in the forward where they multiply by it themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora_kernels.errors import argument_error
from qlora_kernels.integrations.optional import require
from qlora_kernels.nn import QuantizedEmbedding, QuantizedLinear
from qlora_kernels.ops import quantize

# Their forward takes the base's product alone: modules of peft.tuners.
_BY_PRODUCT = frozenset(
    [
        *("adalora", "beft", "boft", "c3a", "fourierft", "gralora", "ia3", "lily", "miss", "oft"),
        *("lora", "pvera", "randlora", "road", "vblora", "vera"),
    ]
)
_stock: dict[str, Callable[..., Any]] = {}  # what `adopt_tuners` replaced
_classes: dict[type, type[nn.Module]] = {}  # stock class -> its class over quantized layers


class OverQuantized:
    """Mixin of a tuner's layer class; `stock` is that."""

    stock: type[nn.Module]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the tuner's, on the dequantized weight where it asks for the weight."""
        y: torch.Tensor
        layer: Any = self
        by_product = self.stock.__module__.split(".")[2] in _BY_PRODUCT
        if by_product or layer.disable_adapters or layer.merged:  # or the base's product is all
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        with _dense_base(self):
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """The tuner's merge of the dequantized weight, quantized once in the weight's format."""
        layer: Any = self
        base = _owner(layer).base_layer
        bias = getattr(base, "bias", None)
        kept = (base.quantized_weight, None if bias is None else bias.detach().clone())
        merged = len(layer.merged_adapters)
        with _dense_base(layer, torch.float32) as dense:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        if len(layer.merged_adapters) == merged:
            return
        added = getattr(dense, "bias", None)
        if added is not None and bias is None:
            raise argument_error("merge", "the adapter", "without bias, as its base is", "one")
        base.set_quantized_weight(quantize(dense.weight.data.to(base.weight_dtype), base.format))
        if bias is not None and added is not None:
            bias.data = added.data.to(bias.dtype)
        layer.__dict__.setdefault("_kept", kept)

    def unmerge(self) -> None:
        """Put back the stored weight that was there before the first merge."""
        layer: Any = self
        kept = layer.__dict__.pop("_kept", None)
        if kept is None:
            super().unmerge()  # type: ignore[misc]
            return
        (qw, bias), base = kept, _owner(layer).base_layer
        layer.merged_adapters.clear()
        base.set_quantized_weight(qw.to(base.weight.device))
        if bias is not None:
            base.bias.data = bias.to(base.bias.device)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles by the stock class's name: this class is made at run time."""
        return _rebuild, (self.stock,), dict(self.__dict__)


def _rebuild(stock: type[nn.Module]) -> nn.Module:
    cls = over_quantized(stock)
    module: nn.Module = cls.__new__(cls)
    return module


def over_quantized(stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a tuner's layer class with `OverQuantized` before it."""
    if stock not in _classes:
        attributes = {name: getattr(stock, name) for name in ("__module__", "__qualname__")}
        _classes[stock] = type(
            stock.__name__, (OverQuantized, stock), {**attributes, "stock": stock}
        )
    return _classes[stock]


def adopt_tuners() -> None:
    """Have tuners other than LoRA made over dense stand-ins; repeatable, undone by
    `leave_tuners`."""
    if _stock:
        return
    tuner = require("peft.tuners.tuners_utils", "patch_peft").BaseTuner
    lora = require("peft.tuners.lora.model", "patch_peft").LoraModel
    inject = _stock["inject"] = tuner.inject_adapter

    def inject_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is lora:
            return inject(self, *args, **kwargs)
        self.__dict__["_create_and_replace"] = functools.partial(_create, self._create_and_replace)
        try:
            return inject(self, *args, **kwargs)
        finally:
            del self.__dict__["_create_and_replace"]

    tuner.inject_adapter = inject_adapter


def leave_tuners() -> None:
    """Undo `adopt_tuners`; without one, do nothing."""
    if _stock:
        tuner = require("peft.tuners.tuners_utils", "unpatch_peft").BaseTuner
        tuner.inject_adapter = _stock.pop("inject")


def _create(
    stock: Any,
    config: Any,
    adapter_name: str,
    target: Any,
    target_name: str,
    parent: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """PEFT's `_create_and_replace` of a tuner."""
    rest: Callable[..., None] = functools.partial(stock, config, adapter_name)
    if hasattr(target, "base_layer"):
        if type(_owner(target).base_layer) is QuantizedLinear:
            with _dense_base(target):
                rest(target, target_name, parent, *args, **kwargs)
            return
    elif type(target) is QuantizedLinear:
        if type(stock.__self__).__name__ == "LNTuningModel":  # it trains a copy of the layer
            name = kwargs.get("current_key", target_name)
            raise argument_error("get_peft_model", "target_modules", "of dense layers", name)
        dense = _dense(target, target.weight_dtype)
        rest(dense, target_name, parent, *args, **kwargs)
        made: Any = getattr(parent, target_name)
        if made is not target:
            _owner(made).base_layer = target
            made.__class__ = over_quantized(type(made))
        return
    rest(target, target_name, parent, *args, **kwargs)


def _owner(layer: Any) -> Any:
    """The innermost tuner layer around a base."""
    while hasattr(layer.base_layer, "base_layer"):
        layer = layer.base_layer
    return layer


@contextmanager
def _dense_base(layer: Any, dtype: torch.dtype | None = None) -> Iterator[Any]:
    """A dense layer in the place of a tuner's base."""
    owner = _owner(layer)
    base = owner.base_layer
    owner.base_layer = dense = _dense(base, dtype or base.weight_dtype)
    try:
        yield dense
    finally:
        owner.base_layer = base


def _dense(base: QuantizedLinear | QuantizedEmbedding, dtype: torch.dtype) -> nn.Module:
    if isinstance(base, QuantizedEmbedding):
        return nn.Embedding.from_pretrained(base.dequantize(dtype), padding_idx=base.padding_idx)
    layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(base.dequantize(dtype), requires_grad=False)
    if base.bias is not None:
        layer.bias = nn.Parameter(base.bias.detach().to(dtype).clone(), requires_grad=False)
    return layer.train(base.training)
