"""merge_to_16bit: a dense model out of a quantized one and its adapters."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from qlora_kernels.errors import type_error
from qlora_kernels.integrations.bitsandbytes import quantized_weight_of
from qlora_kernels.integrations.expert_lora import ExpertLoRA
from qlora_kernels.integrations.experts import make_dense
from qlora_kernels.nn import (
    LoRAAdapter,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
)
from qlora_kernels.nn.replace import set_module
from qlora_kernels.ops import dequantize


@torch.no_grad()
def merge_to_16bit(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Make a model dense: every adapter is added to the weight it was trained over, Ŵ + ΔW, summed
    in fp32 and rounded once. (To the weight as it was before quantization, it would not fit.)

    Takes this library's layers, bitsandbytes' Linear4bit, and PEFT models over either or over dense
    layers; of several adapters the active ones are added. One layer at a time is dense on the way.

    Args:
        model: changed in place, and used up if it is a PeftModel.
        dtype: of every floating-point parameter of the result.

    Returns:
        The model without wrapper, ready for save_pretrained if it is transformers'.

    Raises:
        ArgumentTypeError: not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise type_error("merge_to_16bit", "model", "an nn.Module", type(model).__name__)
    lora = sys.modules.get("peft.tuners.lora.layer")
    wrapper = sys.modules.get("peft.peft_model")
    for module in model.modules():
        if isinstance(module, ExpertLoRA):
            stock: type = module.stock
            module.__class__ = stock
    for module in list(model.modules()):
        if isinstance(module, QuantizedExperts):
            _merge_experts(module)
    for name, module in list(model.named_modules()):
        if lora is not None and isinstance(module, lora.LoraLayer):
            _merge_peft(module, dtype)
        elif isinstance(module, LoRAAdapter):
            weight = module.dense_base(torch.float32) + module.delta_weight()
            set_module(model, name, _linear(weight, module, dtype))
        elif isinstance(module, QuantizedEmbedding):
            table = nn.Embedding.from_pretrained(
                module.dequantize(dtype), padding_idx=module.padding_idx
            )
            set_module(model, name, table)
        elif (
            name and (weight_ := _stored(module)) is not None and _still_there(model, name, module)
        ):
            set_module(model, name, _linear(weight_, module, dtype))
    if wrapper is not None and isinstance(model, wrapper.PeftModel):
        model = model.unload()
    _forget_quantization(model)  # transformers refuses to cast a quantized model
    return model.to(dtype)


def _merge_experts(module: Any) -> None:
    """Make experts dense, with the adapters that are their own added."""
    adapters = {p: module._modules.pop(f"{p}_adapter", None) for p in tuple(module.projections)}
    transposed = module.source_is_transposed
    make_dense(module, torch.float32)
    for projection, adapter in adapters.items():
        if adapter is not None:
            delta = adapter.delta_weight()
            getattr(module, projection).data += delta.transpose(1, 2) if transposed else delta


def _still_there(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module is still where it was: the base of a LoRA layer has been merged by then."""
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


def _stored(module: Any) -> torch.Tensor | None:
    """The dequantized weight of a 4-bit layer in fp32, or None."""
    if isinstance(module, QuantizedLinear):
        return module.dequantize(torch.float32)
    layers = sys.modules.get("bitsandbytes.nn.modules")
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if layers is None or state is None or not isinstance(module, layers.Linear4bit):
        return None
    return dequantize(quantized_weight_of(module.weight, state), torch.float32)


def _merge_peft(layer: Any, dtype: torch.dtype) -> None:
    """Put the merged dense layer where a LoRA layer has its base."""
    base = layer.get_base_layer()
    weight = _stored(base)
    names = [] if layer.merged else [n for n in layer.active_adapters if n in layer.lora_A]
    if weight is None:  # a dense base: PEFT's own merge
        layer.merge(adapter_names=names)
        return
    for name in names:
        if name in layer.lora_variant:
            weight = layer.lora_variant[name].merge_safe(layer, name, weight).float()
        else:
            weight = weight + layer.get_delta_weight(name).float()
    merged = _linear(weight, base, dtype)
    for name in names:
        if layer.lora_bias[name] and merged.bias is not None:
            merged.bias.data += (layer.lora_B[name].bias * layer.scaling[name]).to(dtype)
    layer.base_layer = merged


def _linear(weight: torch.Tensor, like: Any, dtype: torch.dtype) -> Any:
    """The dense layer in place of `like`; transformers' Conv1D where that is what it was."""
    if getattr(like, "source_is_transposed", False) or hasattr(like, "source_cls"):
        from qlora_kernels.integrations.loading import dense_layer

        return dense_layer(weight.to(dtype), like)
    linear = nn.Linear(like.in_features, like.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if like.bias is not None:
        bias = nn.Parameter(like.bias.detach().to(dtype).clone(), requires_grad=False)
        linear.register_parameter("bias", bias)
    return linear.train(like.training)


def _forget_quantization(model: Any) -> None:
    """What transformers remembers of it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False
    config = getattr(model, "config", None)
    if config is not None:
        for field in ("_pre_quantization_dtype", "_is_quantized"):
            config.__dict__.pop(field, None)
