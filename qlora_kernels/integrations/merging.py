"""Merging adapters into 4-bit weights in place, and getting the very same bytes back."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from qlora_kernels.errors import argument_error
from qlora_kernels.nn import QuantizedLinear
from qlora_kernels.ops import quantize


class KeptBytes:
    """Mixin over PEFT's LoRA on a bitsandbytes Linear4bit: unmerge restores the stored weight.

    PEFT quantizes once more on the way back, which ends elsewhere than it started.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's merge: dequantize, add, quantize."""
        base: Any = self.get_base_layer()  # type: ignore[attr-defined]
        kept = None if self.merged else _keep(base)  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Merge lora module to 4-bit")
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        if kept is not None and self.merged:  # type: ignore[attr-defined]
            self.__dict__["_kept"] = kept

    def unmerge(self) -> None:
        """Put back what was there before the first merge."""
        kept = self.__dict__.pop("_kept", None)
        if kept is None:
            super().unmerge()  # type: ignore[misc]
            return
        self.merged_adapters.clear()  # type: ignore[attr-defined]
        base: Any = self.get_base_layer()  # type: ignore[attr-defined]
        weight, attributes, bias = kept
        if weight.device != base.weight.device:  # the model moved while it was merged
            weight = weight.to(base.weight.device)
        # Merging takes the attributes of the weight it replaces, and changes them.
        weight.__dict__.update(attributes)
        base.weight, base.quant_state = weight, attributes["quant_state"]
        attributes["quant_state"].to(weight.device)
        if bias is not None:
            base.bias.data = bias.to(base.bias.device)


def _keep(base: Any) -> tuple[Any, dict[str, Any], torch.Tensor | None]:
    bias = None if base.bias is None else base.bias.detach().clone()
    return base.weight, dict(base.weight.__dict__), bias


class Requantizing:
    """Mixin over PEFT's lora.Linear: merges into a `QuantizedLinear` base itself."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Dequantize, add every adapter in fp32, quantize once in the weight's own format."""
        layer: Any = self
        base = layer.get_base_layer()
        if not isinstance(base, QuantizedLinear):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            return
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [n for n in check_adapters_to_merge(layer, adapter_names) if n in layer.lora_A]
        if not names:
            return
        kept = (base.quantized_weight, None if base.bias is None else base.bias.detach().clone())
        dense = base.dequantize(torch.float32)
        for name in names:
            if name in layer.lora_variant:
                dense = layer.lora_variant[name].merge_safe(layer, name, dense).float()
            else:
                dense += layer.get_delta_weight(name)
        if safe_merge and not bool(torch.isfinite(dense).all()):
            raise argument_error("merge", "the merged weight", "finite", f"NaN or Inf from {names}")
        biases = [layer.lora_B[n].bias * layer.scaling[n] for n in names if layer.lora_bias[n]]
        if biases and base.bias is None:
            raise argument_error("merge", "lora_bias", "False for a base without bias", "True")
        qw = quantize(dense.to(base.weight_dtype), base.format)
        base.set_quantized_weight(qw)
        for bias in biases:
            base.bias.data += bias.detach().to(base.bias.dtype)
        layer.merged_adapters.extend(names)
        layer.__dict__.setdefault("_kept", kept)

    def unmerge(self) -> None:
        """Put back the stored weight that was there before the first merge."""
        layer: Any = self
        kept = self.__dict__.pop("_kept", None)
        if kept is None:
            super().unmerge()  # type: ignore[misc]
            return
        qw, bias = kept
        base = layer.get_base_layer()
        layer.merged_adapters.clear()
        base.set_quantized_weight(qw.to(base.weight.device))
        if bias is not None:
            base.bias.data = bias.to(base.bias.device)
