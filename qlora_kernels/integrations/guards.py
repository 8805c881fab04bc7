"""What others would do to stored bytes as if they were the weight: refused beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qlora_kernels.errors import argument_error
from qlora_kernels.integrations.expert_lora import ExpertLoRA
from qlora_kernels.integrations.merging import KeptBytes, Requantizing
from qlora_kernels.integrations.optional import require
from qlora_kernels.integrations.other_tuners import OverQuantized
from qlora_kernels.nn import QuantizedExperts, StoredWeight

_stock: dict[str, Callable[..., Any]] = {}  # what `guard_peft` replaced


def check_merge(model: nn.Module) -> None:
    """Whether every adapter over a quantized layer can be merged into it.

    Raises:
        ArgumentError: a tuner other than LoRA, whose merge computes with the stored bytes.
    """
    layers = require("peft.tuners.tuners_utils", "merge")
    for name, module in model.named_modules():
        if not isinstance(module, layers.BaseTunerLayer):
            continue
        if isinstance(module, KeptBytes | Requantizing | ExpertLoRA | OverQuantized):
            continue
        base = module.get_base_layer()
        if isinstance(base, StoredWeight | QuantizedExperts):
            kind = f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"
            rule = "over a dense layer (dequantize the model first), or LoRA"
            got = f"{kind} over a {type(base).__name__}"
            raise argument_error("merge", f"the adapter of {name}", rule, got)


def check_trainable(module: nn.Module, option: str = "modules_to_save") -> None:
    """Whether a module that is to be trained and saved, whole or by row, is dense.

    Raises:
        ArgumentError: it is, or holds, a quantized layer.
    """
    for part in module.modules():
        if isinstance(part, StoredWeight | QuantizedExperts):
            rule = "of dense layers (name them in the quantizer's skip)"
            raise argument_error("get_peft_model", option, rule, type(part).__name__)


def refuse_resize(*args: Any, **kwargs: Any) -> None:
    """In place of a model's resize_token_embeddings: it would take packed codes for rows."""
    rule = "dense to be resized (from_pretrained without embeddings=True, or dequantize() first)"
    raise argument_error("resize_token_embeddings", "embeddings", rule, "a QuantizedEmbedding")


def guard_peft() -> None:
    """Have PEFT's merges and modules_to_save checked; repeatable, undone by `unguard_peft`."""
    if _stock:
        return
    tuner = require("peft.tuners.tuners_utils", "guard_peft").BaseTuner
    other = require("peft.utils.other", "guard_peft")
    whole, rows = other.ModulesToSaveWrapper, other.TrainableTokensWrapper
    _stock.update(merge=tuner._check_merge_allowed, save=whole.init_modules, rows=rows.init_modules)

    def check_merge_allowed(self: Any) -> None:
        _stock["merge"](self)
        check_merge(self.model)

    def init_modules(self: Any, *args: Any, **kwargs: Any) -> None:
        check_trainable(self.original_module)
        _stock["save"](self, *args, **kwargs)

    def init_rows(self: Any, *args: Any, **kwargs: Any) -> None:
        check_trainable(self.original_module, "trainable_token_indices")
        _stock["rows"](self, *args, **kwargs)

    tuner._check_merge_allowed, whole.init_modules = check_merge_allowed, init_modules
    rows.init_modules = init_rows


def unguard_peft() -> None:
    """Undo `guard_peft`; without one, do nothing."""
    if _stock:
        tuner = require("peft.tuners.tuners_utils", "unguard_peft").BaseTuner
        other = require("peft.utils.other", "unguard_peft")
        tuner._check_merge_allowed = _stock.pop("merge")
        other.ModulesToSaveWrapper.init_modules = _stock.pop("save")
        other.TrainableTokensWrapper.init_modules = _stock.pop("rows")
