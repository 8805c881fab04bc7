"""Adapter files in PEFT's layout, as they are read: checked by themselves, without a model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora_kernels.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_ENDINGS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}
# Options of a PEFT adapter that change its mathematics beyond B A: name -> the only value taken.
_PLAIN_LORA: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
}
# Initializations that take what they start with out of the base weights: the adapter is one of
# what they leave, not of the model that was given (peft 0.21, tuners/lora/layer.py).
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


@dataclass(frozen=True)
class Shape:
    """Rank and scaling of an adapter."""

    rank: int
    alpha: float
    rslora: bool

    def plain(self) -> Shape:
        """The same scaling written as alpha / rank."""
        return Shape(self.rank, self.alpha * math.sqrt(self.rank), False) if self.rslora else self


def read_config(path: Path, op: str = "load_adapter") -> dict[str, Any]:
    """A LoRA adapter's configuration, for `op`. Raises CheckpointError for any other file, and for
    one whose mathematics are not B A alone."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{op}: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{op}: {path} must be JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{op}: {path} must be the configuration of a LoRA adapter")
    for option, accepted in _PLAIN_LORA.items():
        if option in config and config[option] not in accepted:
            raise CheckpointError(
                f"{op}: {path}: {option} must be {accepted[0]!r}, got {config[option]!r}"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{op}: {path}: init_lora_weights must leave the base weights as they are, got "
            f"{start!r} (save_pretrained converts it: path_initial_model_for_weight_conversion)"
        )
    if not isinstance(config.get("r"), int) or not isinstance(
        config.get("lora_alpha"), int | float
    ):
        raise CheckpointError(f"{op}: {path} must hold r and lora_alpha")
    return config


def read_weights(path: Path, op: str = "load_adapter") -> dict[str, dict[str, torch.Tensor]]:
    """Module name -> lora_a and lora_b, for `op`. Raises CheckpointError for what is not those."""
    try:
        tensors = load_file(path)
    except OSError as error:
        raise CheckpointError(f"{op}: {path} cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{op}: {path} is truncated or foreign ({error})") from error
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        for ending, which in _ENDINGS.items():
            if key.startswith(PREFIX) and key.endswith(ending):
                name = key[len(PREFIX) : -len(ending)]
                found.setdefault(name, {})[which] = tensor
                break
        else:
            raise CheckpointError(
                f"{op}: {path} must hold LoRA weights of linear layers only, got {key}"
            )
    for name, pair in found.items():
        if len(pair) != 2:
            raise CheckpointError(f"{op}: {path} must hold A and B of {name}, got one")
    if not found:
        raise CheckpointError(f"{op}: {path} must hold LoRA weights, got none")
    return found


def check_size(
    folder: Path,
    name: str,
    which: str,
    tensor: torch.Tensor,
    size: tuple[int, int],
    op: str = "load_adapter",
) -> None:
    """Raises CheckpointError for a tensor of another size."""
    if tuple(tensor.shape) != size:
        raise CheckpointError(
            f"{op}: {folder}: {which} of {name} must be {list(size)}, got {list(tensor.shape)}"
        )


def scaling_of(config: Mapping[str, Any], name: str) -> tuple[int, float, bool]:
    """Rank, alpha and rsLoRA of a module."""
    rank = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    return rank, alpha, bool(config.get("use_rslora"))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `name`, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
