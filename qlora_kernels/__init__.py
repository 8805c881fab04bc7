"""QLoRA kernels: 4-bit quantization and matmuls fused with LoRA, as torch ops and modules."""

from __future__ import annotations

import importlib
from typing import Any

from qlora_kernels.autograd import qlora_linear, quantized_linear
from qlora_kernels.backends import backend
from qlora_kernels.formats import (
    Codebook,
    Format,
    QuantizedWeight,
    get_format,
    list_formats,
    register_format,
)
from qlora_kernels.nn import (
    LoRALinear,
    QLoRAGroup,
    QLoRALinear,
    QuantizedEmbedding,
    QuantizedLinear,
    group_projections,
    keep_dense_weights,
    load_adapter,
    lora_parameters,
    replace_linear,
    save_adapter,
    ungroup_projections,
)
from qlora_kernels.ops import dequantize, dequantize_many, double_quantize, explain, quantize

# Names of integrations, imported when they are first used: name -> module.
_LAZY = {
    "QLoRAKernelsConfig": "qlora_kernels.integrations.transformers",
    "accelerate": "qlora_kernels.integrations.peft",
    "calibrate": "qlora_kernels.integrations.initialization",
    "deaccelerate": "qlora_kernels.integrations.peft",
    "initialize_adapters": "qlora_kernels.integrations.initialization",
    "merge_to_16bit": "qlora_kernels.integrations.export",
    "patch_bitsandbytes": "qlora_kernels.integrations.bitsandbytes",
    "unpatch_bitsandbytes": "qlora_kernels.integrations.bitsandbytes",
}


importlib.import_module("qlora_kernels.integrations.autoload").register_with_transformers()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Codebook",
    "Format",
    "LoRALinear",
    "QLoRAGroup",
    "QLoRAKernelsConfig",
    "QLoRALinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "accelerate",
    "backend",
    "calibrate",
    "deaccelerate",
    "dequantize",
    "dequantize_many",
    "double_quantize",
    "explain",
    "get_format",
    "group_projections",
    "initialize_adapters",
    "keep_dense_weights",
    "list_formats",
    "load_adapter",
    "lora_parameters",
    "merge_to_16bit",
    "patch_bitsandbytes",
    "qlora_linear",
    "quantize",
    "quantized_linear",
    "register_format",
    "replace_linear",
    "save_adapter",
    "ungroup_projections",
    "unpatch_bitsandbytes",
]
