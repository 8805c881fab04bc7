"""transformers: a quantizer named "qlora_kernels" for from_pretrained and save_pretrained.

Importing this module registers it, and `integrations.autoload` sees to that: a process that loads
a checkpoint of this kind must have imported the package.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qlora_kernels.errors import CheckpointError, argument_error
from qlora_kernels.formats.bitsandbytes import STATE_KEY
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.integrations.experts import (
    converts_experts,
    is_experts,
    make_dense,
    make_quantized,
    stored_parameters,
    why_not_experts,
)
from qlora_kernels.integrations.guards import refuse_resize
from qlora_kernels.integrations.optional import require
from qlora_kernels.integrations.peft import patch_peft, some
from qlora_kernels.nn import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    StoredWeight,
)

require("transformers", "qlora_kernels.integrations.transformers")
require("accelerate", "qlora_kernels.integrations.transformers")

from transformers.quantizers import auto  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402

from qlora_kernels.integrations.config import QUANT_METHOD, QLoRAKernelsConfig  # noqa: E402
from qlora_kernels.integrations.contents import (  # noqa: E402
    bitsandbytes_block_size,
    places,
    stored_names,
)
from qlora_kernels.integrations.loading import (  # noqa: E402
    BITSANDBYTES_NAMES,
    FromBitsAndBytes,
    QuantizeOnLoad,
    dense_layer,
    is_transposed,
)
from qlora_kernels.integrations.saving import bitsandbytes_state  # noqa: E402

__all__ = ["QLoRAKernelsConfig", "QLoRAKernelsQuantizer"]
logger = logging.getLogger(__name__)


class QLoRAKernelsQuantizer(HfQuantizer):
    """Makes `QuantizedLinear` layers of linear ones (and of GPT-2's Conv1D) while a model loads.

    Attributes:
        quantization_config: a copy of the given one, which loading completes.
        left: name of a layer that could have been quantized, and is dense -> why.
    """

    requires_calibration = False
    quantization_config: QLoRAKernelsConfig

    def __init__(self, quantization_config: QLoRAKernelsConfig, **options: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **options)
        self.left: dict[str, str] = {}
        self.refused: dict[str, str] = {}  # weight -> what it was refused for
        self._files: list[str] | None = None  # of the checkpoint that is being loaded
        self._undo: dict[str, Callable[[], None]] = {}  # layer -> what makes it dense again
        self._kept: list[str] = []  # patterns of the modules that stay dense
        self._said: set[str] = set()  # those of `left` that were logged
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
        self._files = kwargs.get("checkpoint_files")
        is_foreign = config.checkpoint == "bitsandbytes"
        if is_foreign and self.pre_quantized and self._files is not None:
            config.block_size = bitsandbytes_block_size(self._files) or config.block_size
        dtype = kwargs.get("dtype") or model.dtype
        if config.weight_dtype is not None and self.pre_quantized:
            dtype = getattr(torch, config.weight_dtype)
        config.weight_dtype = str(dtype).removeprefix("torch.")
        in_fp32 = {
            *(model._keep_in_fp32_modules or ()),
            *(model._keep_in_fp32_modules_strict or ()),
        }
        # A bitsandbytes checkpoint's list of modules to skip stands in place of the default.
        kept = self.get_modules_to_not_convert(
            model,
            config.skip or None,
            sorted(in_fp32),
            add_default_skips=not (is_foreign and self.pre_quantized),
        )
        self._kept = list(kept)
        if is_foreign and config.skip and not self.pre_quantized:
            config.skip = sorted(kept)
        for name, module in list(model.named_modules()):
            if name and should_convert_module(name, kept):
                self._replace(model, name, module, dtype)
        self._say()
        if importlib.util.find_spec("peft") is not None:
            patch_peft()
        return model

    def _replace(self, model: Any, name: str, module: Any, dtype: torch.dtype) -> None:
        """Put an empty quantized layer where one can be."""
        layer: Any
        config = self.quantization_config
        if is_experts(module):
            reason = why_not_experts(module)
            if reason is not None and config.experts:
                self.left[name] = reason
            elif config.experts:
                self._undo[name] = make_quantized(module, config.storage, dtype)
            return
        if is_transposed(module) or type(module) is nn.Linear:
            shape = tuple(module.weight.shape)
            shape = shape[::-1] if is_transposed(module) else shape
            empty = QuantizedWeight.empty(shape, dtype, config.storage)
            layer = QuantizedLinear(empty, module.bias)
        elif config.embeddings and type(module) is nn.Embedding and module.max_norm is None:
            empty = QuantizedWeight.empty(tuple(module.weight.shape), dtype, config.storage)
            layer = QuantizedEmbedding(empty, module.padding_idx)
        else:
            return
        layer.source_is_transposed = is_transposed(module)
        layer._is_hf_initialized = True  # nothing of it is to be drawn at random
        model.set_submodule(name, layer)
        self._undo[name] = functools.partial(model.set_submodule, name, module)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """The conversions to load with; with them it is known which tensors are in the files, so
        this is where layers that have none are made dense again, for transformers to draw."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        if self._files is not None:
            prefix, held = model.base_model_prefix, model.state_dict()
            names = stored_names(self._files)
            states = [name for name in names if STATE_KEY in name]
            found, packed = (places(n, conversions, prefix, held) for n in (names, states))
            self._match(model, found, packed)
            self._say()
        self._undo.clear()
        return conversions

    def _match(self, model: Any, found: set[str], packed: set[str]) -> None:
        """Compare what is to be loaded with the parameters that the files have tensors for.

        Args:
            found: names of those parameters.
            packed: those that are bitsandbytes' 4-bit weights.

        Raises:
            CheckpointError: a layer of which some tensors are there and others are not; or none,
                if the checkpoint is quantized and had it.
        """
        gone: list[str] = []
        lost: list[str] = []
        dense: list[str] = []
        foreign = self.pre_quantized and self.quantization_config.checkpoint == "bitsandbytes"
        for name, undo in self._undo.items():
            module = model.get_submodule(name)
            wanted = {f"{name}.{key}" for key in self._keys(module)}
            there = wanted & found
            if not there and self._must_be_there(model, name, found):
                gone.append(name)
                continue
            if not there or (not self.pre_quantized and there != wanted):
                self.left[name] = "the checkpoint lacks it, and it is initialized anew"
            elif (there == {f"{name}.weight"} != wanted) or (foreign and not there & packed):
                self.left[name] = "the checkpoint has it dense"
            elif there != wanted:
                lost += sorted(wanted - there)
                continue
            else:
                if any(f"{name}.{k}" not in found for k in module._parameters if "bias" in k):
                    del module._is_hf_initialized  # transformers initializes the bias
                continue
            undo()
            dense.append(name)
        _refuse_lost(lost)
        if gone:
            raise CheckpointError(
                f"from_pretrained: the checkpoint lacks all of {some(gone)}; add to its "
                "configuration's skip what is to be dense and initialized anew"
            )
        if dense:
            self._skip_more(dense)

    def _must_be_there(self, model: Any, name: str, found: set[str]) -> bool:
        """Whether a quantized checkpoint without a layer is a damaged one. It is not if the model
        is of another class, with a head or another part that is new; but it is if the layers of the
        same name in other blocks are there."""
        keys = [*model.all_tied_weights_keys, *(model._keys_to_ignore_on_load_missing or ())]
        if not self.pre_quantized or any(re.search(key, f"{name}.weight") for key in keys):
            return False
        if type(model).__name__ in (model.config.architectures or ()):
            return True
        alike = re.compile(re.sub(r"\d+", r"\\d+", re.escape(name)) + r"\.")
        return any(alike.match(place) for place in found)

    def _keys(self, module: Any) -> list[str]:
        """Names of a layer's parameters that come out of files, biases aside."""
        if isinstance(module, QuantizedExperts):
            return stored_parameters(module) if self.pre_quantized else list(module.projections)
        if not self.pre_quantized or self.quantization_config.checkpoint == "bitsandbytes":
            return ["weight"]
        return [
            key for key, held in module._parameters.items() if held is not None and key != "bias"
        ]

    def _skip_more(self, dense: list[str]) -> None:
        """Add layers to those that the configuration skips, so that a saved model is read so."""
        config = self.quantization_config
        rest = self._undo.keys() - set(dense)
        for name in dense:
            alone = all(should_convert_module(other, [name]) for other in rest)
            config.skip.append(name if alone else f"^{re.escape(name)}$")
        if config.checkpoint == "bitsandbytes":
            config.skip = sorted({*config.skip, *self._kept})
            if config.bitsandbytes is not None:
                config.bitsandbytes["llm_int8_skip_modules"] = config.skip

    def _say(self) -> None:
        """Log what stays dense, a line a reason, once."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            if name not in self._said:
                reasons.setdefault(reason, []).append(name)
        self._said |= self.left.keys()
        for reason, names in reasons.items():
            logger.warning("not quantized: %s: %s", some(names), reason)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, reason in self.refused.items():
            more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
            raise CheckpointError(f"from_pretrained: {name}: {reason}{more}")
        projections: set[str] = set()
        for name, module in model.named_modules():
            if isinstance(module, StoredWeight | QuantizedExperts):
                if not hasattr(module, "_hf_hook"):  # dispatching makes new parameters
                    _check_loaded(name, module)
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
        if isinstance(model.get_input_embeddings(), QuantizedEmbedding):
            model.resize_token_embeddings = refuse_resize
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
        model.__dict__.pop("resize_token_embeddings", None)
        model.is_loaded_in_4bit = False
        return model


def _operations(conversion: Any) -> Sequence[Any]:
    found: Sequence[Any] = getattr(conversion, "operations", ())
    return found


def _refuse_lost(names: list[str]) -> None:
    if names:
        raise CheckpointError(f"from_pretrained: the checkpoint lacks {some(names)}")


def _check_loaded(name: str, module: Any) -> None:
    """Whether every stored tensor of a layer was loaded: tensors need not come from files."""
    experts = isinstance(module, QuantizedExperts)
    keys = stored_parameters(module) if experts else [k for k in module._parameters if k != "bias"]
    held = {key: module._parameters[key] for key in keys}
    _refuse_lost(
        [
            f"{name}.{key}"
            for key, tensor in held.items()
            if tensor is not None
            and not tensor.is_meta
            and not getattr(tensor, "_is_hf_initialized", False)
        ]
    )


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
