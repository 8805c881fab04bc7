"""PEFT's adapters of expert stacks (target_parameters) over `QuantizedExperts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_kernels.errors import argument_error
from qlora_kernels.integrations.experts import stored_parameters
from qlora_kernels.integrations.optional import require
from qlora_kernels.nn import QuantizedExperts
from qlora_kernels.ops import quantize

_made: dict[str, type] = {}


def is_quantized_experts(module: Any) -> bool:
    """Whether a module is a quantized expert stack, or PEFT's wrapper of one."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return isinstance(base, QuantizedExperts)


def expert_lora_class() -> type:
    """PEFT's ParamWrapper with `ExpertLoRA` before it; its adapters are stored as PEFT's are.

    Raises:
        ImportError: PEFT is not installed.
    """
    if "class" not in _made:
        wrapper = require("peft.tuners.lora.layer", "expert_lora_class").ParamWrapper
        attributes = {"stock": wrapper, "__module__": wrapper.__module__}
        _made["class"] = type("ParamWrapper", (ExpertLoRA, wrapper), attributes)
    return _made["class"]


class ExpertLoRA:
    """Lends the adapters to the expert module for the time of a call, which applies them in its
    fused products: the sum W + ΔW that PEFT makes, of all experts, is never there."""

    stock: type[nn.Module]

    def get_param(self) -> torch.Tensor:
        """A stand-in of the stack that is quantized: its shape, dtype and device, without memory of
        its own."""
        layer: Any = self
        experts = layer.get_base_layer()
        like = experts.projections[layer.parameter_name]
        codes = experts._parameters[layer.parameter_name]
        scalar = torch.zeros((), dtype=like.dtype, device=codes.device)
        shape = like.shape[::-1] if experts.source_is_transposed else like.shape
        return scalar.expand(experts.num_experts, *shape)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ParamWrapper's."""
        layer: Any = self
        layer._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)  # refused there unless it is None
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        result: torch.Tensor
        if layer.disable_adapters or layer.merged or not names:
            result = layer.base_layer(x, *args, **kwargs)
            return result
        lent = layer.get_base_layer().__dict__.setdefault("adapters", {})
        lent[layer.parameter_name] = [self._factors(name) for name in names]
        try:
            result = layer.base_layer(x, *args, **kwargs)
        finally:
            del lent[layer.parameter_name]
        return result

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [experts, R, K], B [experts, N, R] and the scaling of an adapter."""
        layer: Any = self
        experts = layer.num_experts
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        stacked = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()
        a = a.reshape(experts, -1, a.shape[1])
        if layer.get_base_layer().source_is_transposed and layer._did_swap_in_out_features:
            # PEFT took [K, N] for [N, K]: its BA is what is added to the transposed matrix.
            a, stacked = stacked.transpose(1, 2).contiguous(), a.transpose(1, 2).contiguous()
        return a, stacked, layer.scaling[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Dequantize, add every adapter in fp32, quantize once in the stack's own format."""
        from peft.tuners.tuners_utils import check_adapters_to_merge

        layer: Any = self
        names = [n for n in check_adapters_to_merge(layer, adapter_names) if n in layer.lora_A]
        if not names:
            return
        experts, projection = layer.get_base_layer(), layer.parameter_name
        like = experts.projections[projection]
        dense = experts.dequantize(projection, torch.float32)
        for name in names:
            delta = layer.get_delta_weight(name).detach().float()
            dense += delta.transpose(1, 2) if experts.source_is_transposed else delta
        if safe_merge and not bool(torch.isfinite(dense).all()):
            raise argument_error("merge", "the merged weight", "finite", f"NaN or Inf from {names}")
        names_of = [n for n in stored_parameters(experts) if n.startswith(projection)]
        kept = {name: experts._parameters[name] for name in names_of}
        experts.hold(projection, [quantize(w.to(like.dtype), like.format) for w in dense])
        layer.merged_adapters.extend(names)
        layer.__dict__.setdefault("_kept", kept)

    def unmerge(self) -> None:
        """Put back the stored stack that was there before the first merge."""
        layer: Any = self
        kept = layer.__dict__.pop("_kept", None)
        if kept is None:
            return
        experts = layer.get_base_layer()
        device = experts._parameters[layer.parameter_name].device
        for name, parameter in kept.items():
            moved = nn.Parameter(parameter.data.to(device), requires_grad=False)
            experts.register_parameter(name, moved)
        layer.merged_adapters.clear()
