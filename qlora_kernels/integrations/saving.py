"""What save_pretrained writes when bitsandbytes' own files are wanted."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kernels.formats.bitsandbytes import to_state_dict
from qlora_kernels.nn import QuantizedLinear


def bitsandbytes_state(model: Any) -> dict[str, torch.Tensor]:
    """The model's state dict with each quantized weight in bitsandbytes' layout."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    fields = model.config.quantization_config.bitsandbytes or {}
    storage = getattr(torch, fields.get("bnb_4bit_quant_storage", "uint8"))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            prefix = f"{name}.weight"
            for key in module._parameters:
                if key != "bias":
                    state.pop(f"{name}.{key}", None)
            state.update(to_state_dict(module.quantized_weight, f"{prefix}.", storage))
    return state


def bitsandbytes_config(config: Any) -> dict[str, Any]:
    """The quantization_config that transformers writes for the same weights in bitsandbytes."""
    fields = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": config.weight_dtype or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": config.format,
        "bnb_4bit_use_double_quant": config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": config.skip or None,
        "llm_int8_threshold": 6.0,
    }
    return {**fields, **(config.bitsandbytes or {})}
