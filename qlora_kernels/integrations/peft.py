"""accelerate: switch a model's bitsandbytes and PEFT layers to the fused path, in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.integrations.bitsandbytes import HELD_OPERANDS
from qlora_kernels.integrations.expert_lora import expert_lora_class, is_quantized_experts
from qlora_kernels.integrations.fused import Fused, fused_class
from qlora_kernels.integrations.guards import guard_peft, unguard_peft
from qlora_kernels.integrations.optional import require
from qlora_kernels.integrations.other_tuners import adopt_tuners, leave_tuners, over_quantized
from qlora_kernels.nn import LoRALinear, QuantizedEmbedding, QuantizedLinear, StoredWeight


@dataclass
class AccelerateReport:
    """What `accelerate` did.

    Attributes:
        fused: module name -> class whose forward is fused now.
        fallback: name of a layer that was switched too, but runs its own forward as it stands ->
            why. It is decided anew on every call.
        untouched: name of a linear or quantized layer that was left alone -> why.
    """

    fused: dict[str, str] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    untouched: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{len(self.fused)} layers fused, {len(self.fallback)} on their own forward, "
            f"{len(self.untouched)} untouched"
        ]
        for title, names in (("own forward", self.fallback), ("untouched", self.untouched)):
            reasons: dict[str, list[str]] = {}
            for name, reason in names.items():
                reasons.setdefault(reason, []).append(name)
            lines += [f"  {title}: {some(held)}: {why}" for why, held in reasons.items()]
        return "\n".join(lines)


def some(names: list[str]) -> str:
    """The first names of many."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def accelerate(model: nn.Module, *, verbose: bool = True) -> AccelerateReport:
    """Run a model's bitsandbytes Linear4bit and PEFT LoRA layers on the fused kernels.

    The layers change their class and keep everything else: parameters, names, state dict, PEFT's
    features. What the fused path does not express (several active adapters, DoRA with dropout,
    aLoRA, biased or mixed-batch adapters, merged or disabled ones, hooks inside the layer) runs the
    layer's own forward. Layers that are made later (a new adapter's, say) need another call.

    Dropout is drawn from one seed per call rather than element by element, so a seeded run with
    dropout differs from the same run before; every other result agrees to rounding. fp32 adapters
    are multiplied in the dtype of the base layer's product.

    On CPUs with bf16 products, call it before stock bitsandbytes has run in eval mode: the first
    such forward repacks a Linear4bit's weight, which then stays on its own forward.

    Args:
        model: changed in place.
        verbose: print the report to stderr.

    Raises:
        ArgumentTypeError: not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise type_error("accelerate", "model", "an nn.Module", type(model).__name__)
    for _, module in list(_candidates(model)):
        cls = fused_class(type(module))
        if cls is not None:
            module.__class__ = cls
    _keep_conversions_that_revert(model)
    report = AccelerateReport()
    inside = _layers_inside(model)
    for name, module in _candidates(model):
        if id(module) in inside:
            continue
        if is_quantized_experts(module):
            report.fused[name] = type(module).__name__
        elif not isinstance(module, Fused):
            report.untouched[name] = _why_untouched(module)
        elif reason := _replaced(module) or module.reason_against():
            report.fallback[name] = reason
        else:
            report.fused[name] = type(module).__name__
    if verbose:
        sys.stderr.write(f"qlora_kernels.accelerate: {report}\n")
    return report


def _keep_conversions_that_revert(model: nn.Module) -> None:
    """Drop transformers' reading of bitsandbytes files from what saving takes back: it has no way
    back and needs none, as the layers' own state is what the files hold."""
    for module in model.modules():
        conversions = module.__dict__.get("_weight_conversions")
        if conversions:
            module.__dict__["_weight_conversions"] = [
                conversion
                for conversion in conversions
                if not any(
                    type(op).__name__ == "Bnb4bitDeserialize"
                    for op in getattr(conversion, "operations", ())
                )
            ]


def deaccelerate(model: nn.Module) -> int:
    """Undo `accelerate`: every layer gets its own class back. Returns how many did.

    Raises:
        ArgumentTypeError: not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise type_error("deaccelerate", "model", "an nn.Module", type(model).__name__)
    restored = 0
    for module in model.modules():
        if isinstance(module, Fused):
            stock: type = module.stock
            module.__class__ = stock
            module.__dict__.pop(HELD_OPERANDS, None)
            restored += 1
    return restored


def patch_peft() -> None:
    """Have PEFT put fused LoRA layers over `QuantizedLinear`, in this process; repeatable.

    get_peft_model, PeftModel.from_pretrained and added adapters then need no `accelerate`, and
    merge_adapter works. Other tuners than LoRA work as well, those that compute with the weight
    itself on the dequantized one. What would take stored bytes for values (modules_to_save of
    quantized layers) is refused. `unpatch_peft` undoes it.

    Raises:
        ImportError: PEFT is not installed.
    """
    model = require("peft.tuners.lora.model", "patch_peft").LoraModel
    guard_peft()
    adopt_tuners()
    if "create" in _stock:
        return
    stock = _stock["create"] = model._create_new_module

    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        if kwargs.get("parameter_name") is not None and is_quantized_experts(target):
            return expert_lora_class()(target, adapter_name, config=lora_config, **kwargs)
        _check_config(lora_config, target, **kwargs)
        module = stock(lora_config, adapter_name, target, **kwargs)
        base = module.get_base_layer()
        cls = fused_class(type(module)) if type(base) is QuantizedLinear else None
        if cls is not None:
            module.__class__ = cls
        elif type(base) is QuantizedEmbedding:
            module.__class__ = over_quantized(type(module))
        return module

    model._create_new_module = staticmethod(create)


def _check_config(config: Any, target: Any, **kwargs: Any) -> None:
    """Whether a LoRA layer over a quantized one can be made as PEFT makes it.

    Raises:
        ArgumentError: it would take the stored bytes for the weight.
    """
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if not isinstance(base, StoredWeight):
        return
    parameter, start = kwargs.get("parameter_name"), config.init_lora_weights
    if parameter is not None:
        rule = "of dense layers or of experts (a quantized layer is one of target_modules)"
        raise argument_error("get_peft_model", "target_parameters", rule, parameter)
    if isinstance(start, str) and start.lower().startswith(_FROM_THE_WEIGHT):
        rule = "True, False, gaussian or eva (qlora_kernels.initialize_adapters has the rest)"
        raise argument_error("get_peft_model", "init_lora_weights", rule, repr(start))


# Starts of PEFT's that factor the base's weight and change it.
_FROM_THE_WEIGHT = ("pissa", "olora", "corda", "loftq", "orthogonal", "mica")


def unpatch_peft() -> None:
    """Undo `patch_peft`; without one, do nothing."""
    unguard_peft()
    leave_tuners()
    if "create" in _stock:
        model = require("peft.tuners.lora.model", "unpatch_peft").LoraModel
        model._create_new_module = staticmethod(_stock.pop("create"))


_stock: dict[str, Any] = {}  # what patch_peft replaced


def _replaced(module: Any) -> str | None:
    """Whether calls to a layer never reach its class's forward."""
    return "its forward is replaced" if "forward" in module.__dict__ else None


def _layers_inside(model: nn.Module) -> set[int]:
    """The modules that a LoRA layer holds: its base, A, B and so on, which it speaks for."""
    held: set[int] = set()
    for module in model.modules():
        if _is_lora(module):
            held |= {id(part) for part in module.modules() if part is not module}
    return held


def _is_lora(module: nn.Module) -> bool:
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and isinstance(module, layers.BaseTunerLayer)


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that are, or might have been, switched."""
    quantized = sys.modules.get("bitsandbytes.nn.modules")
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear)
        is_8bit = quantized is not None and isinstance(module, quantized.Linear8bitLt)
        if is_linear or is_8bit or _is_lora(module):
            yield name, module


def _why_untouched(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, QuantizedLinear | LoRALinear):
        return f"a {name}, which is fused by itself"
    if _is_lora(module):
        return f"PEFT's {type(module).__module__.split('.')[-2]}.{name} has no fused form"
    if type(module) is nn.Linear:
        return "a dense layer without an adapter"
    return f"a {name}"
