"""L5: modules. Each holds parameters and calls one differentiable function."""

from qlora_kernels.nn.adapter import LoRAAdapter
from qlora_kernels.nn.adapter_files import load_adapter, save_adapter
from qlora_kernels.nn.expert_adapter import ExpertAdapter, lora_parameters
from qlora_kernels.nn.grouping import GroupReport, group_projections, ungroup_projections
from qlora_kernels.nn.lora_linear import LoRALinear
from qlora_kernels.nn.qlora_group import QLoRAGroup
from qlora_kernels.nn.qlora_linear import QLoRALinear
from qlora_kernels.nn.quantized_embedding import QuantizedEmbedding
from qlora_kernels.nn.quantized_experts import QuantizedExperts
from qlora_kernels.nn.quantized_linear import QuantizedLinear, keep_dense_weights
from qlora_kernels.nn.replace import ReplaceReport, replace_linear
from qlora_kernels.nn.stored_weight import StoredWeight

__all__ = [
    "ExpertAdapter",
    "GroupReport",
    "LoRAAdapter",
    "LoRALinear",
    "QLoRAGroup",
    "QLoRALinear",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "ReplaceReport",
    "StoredWeight",
    "group_projections",
    "keep_dense_weights",
    "load_adapter",
    "lora_parameters",
    "replace_linear",
    "save_adapter",
    "ungroup_projections",
]
