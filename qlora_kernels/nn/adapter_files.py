"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

A module "layers.0.q_proj" is stored as base_model.model.layers.0.q_proj.lora_A.weight [R, K] and
…lora_B.weight [N, R]. PEFT loads what is written here, and what PEFT writes is loaded, as far as
`QLoRALinear` can represent it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qlora_kernels.errors import CheckpointError, argument_error
from qlora_kernels.files import save_tensors, write_text
from qlora_kernels.nn.adapter import LoRAAdapter, check_rank
from qlora_kernels.nn.lora_linear import LoRALinear
from qlora_kernels.nn.qlora_linear import QLoRALinear
from qlora_kernels.nn.quantized_linear import QuantizedLinear
from qlora_kernels.nn.replace import name_ends_with, set_module

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDINGS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}
# Options of a PEFT adapter that change its mathematics beyond B A: name -> the only value taken.
_PLAIN_LORA: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
}


@dataclass(frozen=True)
class _Shape:
    rank: int
    alpha: float
    rslora: bool

    def plain(self) -> _Shape:
        """The same scaling written as alpha / rank."""
        return _Shape(self.rank, self.alpha * math.sqrt(self.rank), False) if self.rslora else self


def save_adapter(model: nn.Module, path: str | Path, *, base_model_name: str | None = None) -> None:
    """Write every adapter of `model` into the folder `path`, each file whole or not at all.

    Layers may differ in rank and alpha; PEFT has one dropout for all, so the commonest is written.

    Args:
        model: with `QLoRALinear` or `LoRALinear` layers.
        path: a folder, created if missing.
        base_model_name: what PEFT should load the adapter onto.

    Raises:
        ArgumentError: a model without adapters.
        OSError: the folder cannot be written; a file that was there is then as it was.
    """
    adapters = {
        name: module for name, module in model.named_modules() if isinstance(module, LoRAAdapter)
    }
    if not adapters:
        raise argument_error("save_adapter", "model", "one with LoRA layers", "none")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, module in adapters.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = module.lora_a.detach()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = module.lora_b.detach()
    save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    config = _config(model, adapters, base_model_name)
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _config(
    model: nn.Module, adapters: Mapping[str, LoRAAdapter], base_model_name: str | None
) -> dict[str, Any]:
    shapes = {name: _Shape(a.rank, a.alpha, a.rslora) for name, a in adapters.items()}
    if len({shape.rslora for shape in shapes.values()}) > 1:
        shapes = {name: shape.plain() for name, shape in shapes.items()}
    common = Counter(shapes.values()).most_common(1)[0][0]
    dropout = Counter(adapter.dropout_p for adapter in adapters.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": common.rank,
        "lora_alpha": _number(common.alpha),
        "use_rslora": common.rslora,
        "lora_dropout": dropout,
        "rank_pattern": {
            _pattern(name): shape.rank
            for name, shape in shapes.items()
            if shape.rank != common.rank
        },
        "alpha_pattern": {
            _pattern(name): _number(shape.alpha)
            for name, shape in shapes.items()
            if shape.alpha != common.alpha
        },
        "target_modules": _target_modules(model, adapters),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _number(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(name: str) -> str:
    """PEFT matches the keys of its patterns as regular expressions at the end of a name."""
    return "^" + re.escape(name)


def _target_modules(model: nn.Module, adapters: Mapping[str, LoRAAdapter]) -> list[str]:
    """The ends of the adapted names where they mean no other linear layer, else the whole names."""
    ends = sorted({name.rpartition(".")[2] for name in adapters})
    for name, module in model.named_modules():
        is_other = isinstance(module, nn.Linear) and name not in adapters
        if is_other and any(name_ends_with(name, end) for end in ends):
            return sorted(adapters)
    return ends


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Load an adapter in PEFT's layout into `model`, in place.

    A dense linear layer that the adapter names becomes a `LoRALinear`, a `QuantizedLinear` a
    `QLoRALinear`; a layer with an adapter gets the file's, of whatever rank. Values are cast to
    the dtype of the adapter they replace (fp32 for a new one). Nothing changes if anything is
    wrong.

    Raises:
        CheckpointError: a file is missing, truncated or not PEFT's; an adapter with more than A
            and B (DoRA, biases, saved modules); modules that the model lacks or whose shapes
            differ; adapters of the model that the file has no values for.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG_NAME)
    weights = _read_weights(folder / WEIGHTS_NAME)
    loaded: dict[str, tuple[nn.Linear, _Shape, dict[str, torch.Tensor]]] = {}
    modules = dict(model.named_modules())
    for name, pair in weights.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise CheckpointError(
                f"load_adapter: {folder / WEIGHTS_NAME} must fit the model, got {name}, "
                "which is no linear layer of it"
            )
        loaded[name] = (module, _shape_of(folder, config, name, module, pair), pair)
    missing = [n for n, m in modules.items() if isinstance(m, LoRAAdapter) and n not in weights]
    if missing:
        raise CheckpointError(
            f"load_adapter: {folder / WEIGHTS_NAME} must hold every adapter of the model, "
            f"got none for {', '.join(missing)}"
        )
    dropout = float(config.get("lora_dropout") or 0.0)
    for name, (module, shape, pair) in loaded.items():
        layer = _with_adapter(module, shape, dropout)
        with torch.no_grad():
            layer.lora_a.copy_(pair["lora_a"])
            layer.lora_b.copy_(pair["lora_b"])
        set_module(model, name, layer)


def read_adapter(path: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module name -> A [R, K], B [N, R] and scaling of an adapter in PEFT's layout.

    Raises:
        CheckpointError: as `load_adapter`, of what the files alone can tell.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG_NAME)
    found = {}
    for name, pair in _read_weights(folder / WEIGHTS_NAME).items():
        a, b = pair["lora_a"], pair["lora_b"]
        sizes = nn.Linear(a.shape[-1], b.shape[0], bias=False, device="meta")
        shape = _shape_of(folder, config, name, sizes, pair).plain()
        found[name] = (a, b, shape.alpha / shape.rank)
    return found


def _with_adapter(module: nn.Linear, shape: _Shape, dropout: float) -> LoRAAdapter:
    """`module` with an adapter of that shape, values yet to come: itself if it has one."""
    if isinstance(module, LoRAAdapter):
        if module.rank != shape.rank:
            for name, size in (
                ("lora_a", (shape.rank, module.in_features)),
                ("lora_b", (module.out_features, shape.rank)),
            ):
                old = module.get_parameter(name)
                setattr(module, name, nn.Parameter(old.new_empty(size), old.requires_grad))
        module.alpha, module.rslora, module.dropout_p = shape.alpha, shape.rslora, dropout
        module.unmerge()
        return module
    make = QLoRALinear if isinstance(module, QuantizedLinear) else LoRALinear
    return make.from_linear(
        module, rank=shape.rank, alpha=shape.alpha, rslora=shape.rslora, dropout=dropout
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"load_adapter: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"load_adapter: {path} must be JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"load_adapter: {path} must be the configuration of a LoRA adapter")
    for option, accepted in _PLAIN_LORA.items():
        if option in config and config[option] not in accepted:
            raise CheckpointError(
                f"load_adapter: {path}: {option} must be {accepted[0]!r}, got {config[option]!r}"
            )
    if not isinstance(config.get("r"), int) or not isinstance(
        config.get("lora_alpha"), int | float
    ):
        raise CheckpointError(f"load_adapter: {path} must hold r and lora_alpha")
    return config


def _read_weights(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module name -> lora_a and lora_b."""
    try:
        tensors = load_file(path)
    except OSError as error:
        raise CheckpointError(f"load_adapter: {path} cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise CheckpointError(f"load_adapter: {path} is truncated or foreign ({error})") from error
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        for ending, which in _ENDINGS.items():
            if key.startswith(_PREFIX) and key.endswith(ending):
                name = key[len(_PREFIX) : -len(ending)]
                found.setdefault(name, {})[which] = tensor
                break
        else:
            raise CheckpointError(
                f"load_adapter: {path} must hold LoRA weights of linear layers only, got {key}"
            )
    for name, pair in found.items():
        if len(pair) != 2:
            raise CheckpointError(f"load_adapter: {path} must hold A and B of {name}, got one")
    if not found:
        raise CheckpointError(f"load_adapter: {path} must hold LoRA weights, got none")
    return found


def _shape_of(
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    module: nn.Linear,
    pair: Mapping[str, torch.Tensor],
) -> _Shape:
    """Rank and scaling of a module, checked against its tensors and its sizes."""
    rank = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    sizes = {
        "lora_a": (rank, module.in_features),
        "lora_b": (module.out_features, rank),
    }
    for which, size in sizes.items():
        if tuple(pair[which].shape) != size:
            raise CheckpointError(
                f"load_adapter: {folder}: {which} of {name} must be {list(size)}, "
                f"got {list(pair[which].shape)}"
            )
    check_rank(f"load_adapter: {name}", rank, module.out_features, module.in_features)
    return _Shape(rank, alpha, bool(config.get("use_rslora")))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `name`, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
