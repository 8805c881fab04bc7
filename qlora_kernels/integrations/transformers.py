"""transformers: a quantizer named "qlora_kernels" for from_pretrained and save_pretrained.

Importing this module registers it; `qlora_kernels.QLoRAKernelsConfig` does so by itself. A process
that loads a checkpoint of this kind must have it imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora_kernels.errors import CheckpointError, argument_error
from qlora_kernels.formats.bitsandbytes import quant_type_of
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.formats.registry import get_format
from qlora_kernels.integrations.experts import (
    converts_experts,
    is_experts,
    make_dense,
    make_quantized,
    why_not_experts,
)
from qlora_kernels.integrations.optional import require
from qlora_kernels.integrations.peft import patch_peft
from qlora_kernels.nn import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    StoredWeight,
)

require("transformers", "qlora_kernels.integrations.transformers")
require("accelerate", "qlora_kernels.integrations.transformers")

from transformers import AutoConfig  # noqa: E402
from transformers.quantizers import auto  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

from qlora_kernels.integrations.loading import (  # noqa: E402
    BITSANDBYTES_NAMES,
    FromBitsAndBytes,
    QuantizeOnLoad,
    dense_layer,
    is_transposed,
)
from qlora_kernels.integrations.saving import bitsandbytes_config, bitsandbytes_state  # noqa: E402

QUANT_METHOD = "qlora_kernels"
CHECKPOINTS = ("qlora_kernels", "bitsandbytes")


class QLoRAKernelsConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes a model's linear layers, and what save_pretrained writes.

    Args:
        format: a registered format's name.
        block_size, double_quant: None: the format's own.
        skip: module names (or their ends, or regular expressions) that stay dense, beside those
            that always do: output embeddings, tied weights, the model's keep-in-fp32 modules.
        experts: quantize mixtures of experts that are stored as 3-D parameters.
        embeddings: quantize token embeddings too, where they are not tied.
        checkpoint: "qlora_kernels", or "bitsandbytes" to read and write bitsandbytes' files.
        weight_dtype: name of the dtype the weights had; set on loading.
        bitsandbytes: the fields of the BitsAndBytesConfig that a checkpoint came with.

    Raises:
        ArgumentError: an unknown format, a bad block size, a checkpoint format that cannot hold it.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int | None = None,
        double_quant: bool | None = None,
        skip: Sequence[str] = (),
        experts: bool = True,
        embeddings: bool = False,
        checkpoint: str = "qlora_kernels",
        weight_dtype: str | None = None,
        bitsandbytes: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise argument_error(
                "QLoRAKernelsConfig", "options", "known ones", ", ".join(sorted(unknown))
            )
        if checkpoint not in CHECKPOINTS:
            raise argument_error(
                "QLoRAKernelsConfig", "checkpoint", f"one of {CHECKPOINTS}", repr(checkpoint)
            )
        if checkpoint == "bitsandbytes" and embeddings:
            raise argument_error(
                "QLoRAKernelsConfig", "embeddings", "False for bitsandbytes", embeddings
            )
        resolved = get_format(format).override(block_size, double_quant)
        if checkpoint == "bitsandbytes" and quant_type_of(resolved) is None:
            raise argument_error(
                "QLoRAKernelsConfig", "format", "nf4 or fp4 for bitsandbytes", repr(format)
            )
        # transformers declares it as one of its own methods.
        vars(self)["quant_method"] = QUANT_METHOD
        self.format = format
        self.block_size = resolved.block_size
        self.double_quant = resolved.double_quant
        self.skip = list(skip)
        self.experts = experts and checkpoint != "bitsandbytes"
        self.embeddings = embeddings
        self.checkpoint = checkpoint
        self.weight_dtype = weight_dtype
        self.bitsandbytes = bitsandbytes

    @property
    def storage(self) -> Format:
        """The Format that the fields name."""
        return get_format(self.format).override(self.block_size, self.double_quant)

    @classmethod
    def from_bitsandbytes(cls, config: Any) -> QLoRAKernelsConfig:
        """The configuration under which a bitsandbytes checkpoint is read into these layers.

        Args:
            config: a BitsAndBytesConfig, or the dict of one.

        Raises:
            CheckpointError: not a 4-bit one.
        """
        fields = config if isinstance(config, dict) else config.to_dict()
        if not fields.get("load_in_4bit"):
            raise CheckpointError(
                "QLoRAKernelsConfig.from_bitsandbytes: config must be of a 4-bit checkpoint"
            )
        return cls(
            format=fields.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(fields.get("bnb_4bit_use_double_quant", False)),
            skip=fields.get("llm_int8_skip_modules") or (),
            checkpoint="bitsandbytes",
            bitsandbytes=fields,
        )

    @classmethod
    def adopt(cls, path: str, **options: Any) -> Any:
        """The model configuration to load a bitsandbytes checkpoint with, into these layers:
        `from_pretrained(path, config=QLoRAKernelsConfig.adopt(path))`.

        Args:
            path: a folder or a hub name.
            options: of AutoConfig.from_pretrained.

        Raises:
            CheckpointError: not a 4-bit bitsandbytes checkpoint.
        """
        config = AutoConfig.from_pretrained(path, **options)
        stored = getattr(config, "quantization_config", None)
        if stored is None:
            raise CheckpointError(f"QLoRAKernelsConfig.adopt: {path} is not a quantized checkpoint")
        config.quantization_config = cls.from_bitsandbytes(stored).fields()
        return config

    def fields(self) -> dict[str, Any]:
        """The options as from_dict takes them."""
        return dict(self.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: bitsandbytes' own fields when its files are written."""
        return bitsandbytes_config(self) if self.checkpoint == "bitsandbytes" else self.fields()


class QLoRAKernelsQuantizer(HfQuantizer):
    """Makes `QuantizedLinear` layers of linear ones (and of GPT-2's Conv1D) while a model loads."""

    requires_calibration = False
    quantization_config: QLoRAKernelsConfig

    def __init__(self, quantization_config: QLoRAKernelsConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        # What one weight is in a foreign checkpoint; our own tensors are parameters.
        if quantization_config.checkpoint == "bitsandbytes" and self.pre_quantized:
            self.serialized_names = {"weight": list(BITSANDBYTES_NAMES)}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses offloading to disk: a quantized weight is several tensors that move together."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise argument_error("from_pretrained", "device_map", "without disk", device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """Where nothing is said: the current GPU, else the CPU."""
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, for device_map="auto"; scales included."""
        return self.quantization_config.storage.bits_per_param((4096, 4096)) / 8

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a checkpoint's tensor of this name is to be quantized."""
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantizedExperts):
            return name in module.projections
        return isinstance(module, StoredWeight) and name == "weight"

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        dtype = kwargs.get("dtype") or model.dtype
        if config.weight_dtype is not None and self.pre_quantized:
            dtype = getattr(torch, config.weight_dtype)
        config.weight_dtype = str(dtype).removeprefix("torch.")
        # bitsandbytes' list of modules to skip stands in place of the default, not beside it.
        kept = self.get_modules_to_not_convert(
            model,
            config.skip or None,
            model._keep_in_fp32_modules,
            add_default_skips=config.checkpoint != "bitsandbytes",
        )
        for name, module in list(model.named_modules()):
            if name and should_convert_module(name, kept):
                _replace(model, name, module, config, dtype)
        if importlib.util.find_spec("peft") is not None:
            patch_peft()
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        projections: set[str] = set()
        for name, module in model.named_modules():
            if isinstance(module, StoredWeight | QuantizedExperts):
                _check_codebooks(name, module)
            if isinstance(module, QuantizedExperts):
                projections |= set(module.projections)
        # Conversions that saving must not take back.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", [])
            if not any(isinstance(op, FromBitsAndBytes) for op in _operations(conversion))
            and not converts_experts(conversion, sorted(projections))
        ]
        # PEFT's prepare_model_for_kbit_training, Trainer and accelerate ask for it.
        model.is_loaded_in_4bit = True
        return model

    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: the weights themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Forward and backward are torch ops."""
        return True

    def get_quantize_ops(self) -> Any:
        """The conversion of a dense tensor."""
        return QuantizeOnLoad(self)

    def get_load_operations(self) -> dict[str, Any]:
        """The conversion of bitsandbytes' tensors."""
        return {"deserialize": FromBitsAndBytes}

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """The tensors to save, when they are not the model's own."""
        if self.quantization_config.checkpoint == "bitsandbytes":
            return bitsandbytes_state(model), {}
        return None, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # what saving leaves in the model's configuration
            dtype = getattr(torch, dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                model.set_submodule(name, dense_layer(module.dequantize(dtype), module))
            elif isinstance(module, QuantizedEmbedding):
                weight = module.dequantize(dtype)
                table = nn.Embedding.from_pretrained(weight, padding_idx=module.padding_idx)
                model.set_submodule(name, table)
            elif isinstance(module, QuantizedExperts):
                make_dense(module, dtype)
        model.is_loaded_in_4bit = False
        return model


def _operations(conversion: Any) -> Sequence[Any]:
    found: Sequence[Any] = getattr(conversion, "operations", ())
    return found


def _replace(
    model: Any, name: str, module: Any, config: QLoRAKernelsConfig, dtype: torch.dtype
) -> None:
    """Put an empty quantized layer where one can be."""
    layer: Any
    if is_experts(module):
        if config.experts and why_not_experts(module) is None:
            make_quantized(module, config.storage, dtype)
        return
    if is_transposed(module) or type(module) is nn.Linear:
        shape = tuple(module.weight.shape)
        shape = shape[::-1] if is_transposed(module) else shape
        layer = QuantizedLinear(QuantizedWeight.empty(shape, dtype, config.storage), module.bias)
    elif config.embeddings and type(module) is nn.Embedding and module.max_norm is None:
        empty = QuantizedWeight.empty(tuple(module.weight.shape), dtype, config.storage)
        layer = QuantizedEmbedding(empty, module.padding_idx)
    else:
        return
    layer.source_is_transposed = is_transposed(module)
    layer._is_hf_initialized = True  # nothing of it is to be drawn at random
    model.set_submodule(name, layer)


def _check_codebooks(name: str, module: Any) -> None:
    """Whether the tables that were loaded are those of the format the config names."""
    formats = (
        {key: like.format for key, like in module.projections.items()}
        if isinstance(module, QuantizedExperts)
        else {"weight": module.format}
    )
    for key, fmt in formats.items():
        stored = module._parameters.get(f"{key}_codebook")
        if stored is None:  # the table is learned, and each weight has its own
            continue
        table = fmt.codebook.table(stored.device).view(torch.int32)
        if not stored.is_meta and not torch.equal(stored.detach(), table):
            raise CheckpointError(
                f"from_pretrained: {name}.{key}_codebook is not the table of format "
                f"{fmt.name!r}; register the format that the checkpoint was made with"
            )


def _register() -> None:
    """Make the quantizer known; harmless when it is."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = QLoRAKernelsConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = QLoRAKernelsQuantizer


_register()
