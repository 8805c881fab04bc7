"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

A module "layers.0.q_proj" is stored as base_model.model.layers.0.q_proj.lora_A.weight [R, K] and
…lora_B.weight [N, R]; the projections of experts are target_parameters, stored under the name of
their module and as many ".base_layer" as wrappers are around (`expert_adapter`). PEFT loads what is
written here, and what PEFT writes is loaded, as far as these layers can represent it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kernels.errors import CheckpointError, argument_error
from qlora_kernels.files import save_tensors, write_text
from qlora_kernels.nn.adapter import LoRAAdapter, check_rank
from qlora_kernels.nn.adapter_parts import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    Shape,
    check_size,
    read_config,
    read_weights,
    scaling_of,
)
from qlora_kernels.nn.conv1d import as_linear, is_conv1d, is_linear
from qlora_kernels.nn.expert_adapter import ExpertAdapter, from_file, to_files
from qlora_kernels.nn.lora_linear import LoRALinear
from qlora_kernels.nn.qlora_linear import QLoRALinear
from qlora_kernels.nn.quantized_experts import QuantizedExperts
from qlora_kernels.nn.quantized_linear import QuantizedLinear
from qlora_kernels.nn.replace import is_targeted, name_ends_with, set_module

# Name of a module of experts -> it, and its adapters by projection.
_Experts = dict[str, tuple[QuantizedExperts, dict[str, ExpertAdapter]]]


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
    experts = _adapted_experts(model)
    if not adapters and not experts:
        raise argument_error("save_adapter", "model", "one with LoRA layers", "none")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, module in adapters.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_a.detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_b.detach()
    for name, (module_, owned) in experts.items():
        for ending, tensor in to_files(list(owned.values()), module_.swaps_factors).items():
            tensors[f"{PREFIX}{name}{ending}"] = tensor.contiguous()
    save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    config = _config(model, adapters, experts, base_model_name)
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _adapted_experts(model: nn.Module) -> _Experts:
    """The modules whose experts have adapters, with those by projection, in their order."""
    found: _Experts = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            owned = {p: module.adapter(p) for p in module.projections}
            kept = {p: adapter for p, adapter in owned.items() if adapter is not None}
            if kept:
                found[name] = (module, kept)
    return found


def _config(
    model: nn.Module,
    adapters: Mapping[str, LoRAAdapter],
    experts: _Experts,
    base_model_name: str | None,
) -> dict[str, Any]:
    every: dict[str, LoRAAdapter | ExpertAdapter] = {**adapters}
    for name, (_, owned) in experts.items():
        every |= {f"{name}.{projection}": adapter for projection, adapter in owned.items()}
    shapes = {name: Shape(a.rank, a.alpha, a.rslora) for name, a in every.items()}
    if len({shape.rslora for shape in shapes.values()}) > 1:
        shapes = {name: shape.plain() for name, shape in shapes.items()}
    common = Counter(shapes.values()).most_common(1)[0][0]
    # PEFT refuses dropout beside adapters of experts, and has no use for it after training.
    dropouts = Counter(0.0 if experts else a.dropout_p for a in adapters.values()) or {0.0: 1}
    dropout = Counter(dropouts).most_common(1)[0][0]
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
        "target_modules": _target_modules(model, adapters) if adapters else None,
        "target_parameters": _target_parameters(model, experts) if experts else None,
        "bias": "none",
        # As the dense model has them, which base_model_name is of.
        "fan_in_fan_out": bool(adapters) and all(_is_transposed(a) for a in adapters.values()),
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _is_transposed(module: Any) -> bool:
    """Whether a layer was made from a Conv1D."""
    return getattr(module, "source_is_transposed", False)


def _number(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(name: str) -> str:
    """PEFT matches the keys of its patterns as regular expressions at the end of a name."""
    return "^" + re.escape(name)


def _target_modules(model: nn.Module, adapters: Mapping[str, LoRAAdapter]) -> list[str]:
    """The ends of the adapted names where they mean no other linear layer, else the whole names."""
    ends = sorted({name.rpartition(".")[2] for name in adapters})
    for name, module in model.named_modules():
        is_other = is_linear(module) and name not in adapters
        if is_other and any(name_ends_with(name, end) for end in ends):
            return sorted(adapters)
    return ends


def _target_parameters(model: nn.Module, experts: _Experts) -> list[str]:
    """As `_target_modules`, of the adapted projections; an end is a module's and a projection's."""
    names = {f"{name}.{projection}" for name, (_, owned) in experts.items() for projection in owned}
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    for name, module in model.named_modules():
        others = module.projections if isinstance(module, QuantizedExperts) else ()
        for full in (f"{name}.{projection}" for projection in others):
            if full not in names and any(name_ends_with(full, end) for end in ends):
                return sorted(names)
    return ends


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Load an adapter in PEFT's layout into `model`, in place.

    A dense linear layer that the adapter names becomes a `LoRALinear`, a `QuantizedLinear` a
    `QLoRALinear`, and `QuantizedExperts` get an adapter of their own; a layer with an adapter gets
    the file's, of whatever rank. Values are cast to the dtype of the adapter they replace (fp32 for
    a new one). Nothing changes if anything is wrong.

    Raises:
        CheckpointError: a file is missing, truncated or not PEFT's; an adapter with more than A
            and B (DoRA, biases, saved modules); modules that the model lacks or whose shapes
            differ; adapters of the model that the file has no values for.
    """
    folder = Path(path)
    config = read_config(folder / CONFIG_NAME)
    weights = read_weights(folder / WEIGHTS_NAME)
    loaded: dict[str, tuple[Any, Shape, dict[str, torch.Tensor]]] = {}
    modules = dict(model.named_modules())
    stacks = _place_experts(folder, config, modules, weights)
    for name, pair in weights.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            raise CheckpointError(
                f"load_adapter: {folder / WEIGHTS_NAME} must fit the model, got {name}, "
                "which is no linear layer of it"
            )
        linear = as_linear(module)
        loaded[name] = (module, _shape_of(folder, config, name, linear, pair), pair)
    missing = [n for n, m in modules.items() if isinstance(m, LoRAAdapter) and n not in weights]
    for name, (_, owned) in _adapted_experts(model).items():
        missing += [f"{name}.{p}" for p in owned if f"{name}.{p}" not in stacks]
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
    for experts, projection, shape, (lora_a, lora_b) in stacks.values():
        own = experts.adapter(projection)
        trained = own is None or own.lora_a.requires_grad
        added = experts.add_adapter(
            projection, rank=shape.rank, alpha=shape.alpha, rslora=shape.rslora
        ).requires_grad_(trained)
        with torch.no_grad():
            added.lora_a.copy_(lora_a)
            added.lora_b.copy_(lora_b)


def _place_experts(
    folder: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    weights: dict[str, dict[str, torch.Tensor]],
) -> dict[str, tuple[QuantizedExperts, str, Shape, tuple[torch.Tensor, torch.Tensor]]]:
    """The experts' adapters of a file, which are taken out of `weights`: full name of a projection
    -> its module, its name, rank and scaling, A and B."""
    found: dict[str, Any] = {}
    targets = config.get("target_parameters") or ()
    for name, module in modules.items():
        if not isinstance(module, QuantizedExperts):
            continue
        adapted = [p for p in module.projections if is_targeted(f"{name}.{p}", tuple(targets))]
        for depth, projection in enumerate(reversed(adapted)):
            key, full = name + ".base_layer" * depth, f"{name}.{projection}"
            pair = weights.pop(key, None)
            if pair is None:
                raise CheckpointError(
                    f"load_adapter: {folder / WEIGHTS_NAME} must hold A and B of {full}, got none"
                )
            rank, alpha, rslora = scaling_of(config, full)
            outputs, inputs = module.projections[projection].shape
            check_rank(f"load_adapter: {full}", rank, outputs, inputs)
            if module.swaps_factors:
                outputs, inputs = inputs, outputs
            size = rank * module.num_experts
            for which, wanted in (("lora_a", (size, inputs)), ("lora_b", (outputs, size))):
                check_size(folder, full, which, pair[which], wanted)
            factors = from_file(
                pair["lora_a"], pair["lora_b"], module.num_experts, module.swaps_factors
            )
            found[full] = (module, projection, Shape(rank, alpha, rslora), factors)
    return found


def _with_adapter(module: Any, shape: Shape, dropout: float) -> LoRAAdapter:
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
    layer: Any = make.from_linear(
        as_linear(module), rank=shape.rank, alpha=shape.alpha, rslora=shape.rslora, dropout=dropout
    )
    if is_conv1d(module) or _is_transposed(module):
        layer.source_is_transposed = True
    made: LoRAAdapter = layer
    return made


def _shape_of(
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    module: nn.Linear,
    pair: Mapping[str, torch.Tensor],
) -> Shape:
    """Rank and scaling of a module, checked against its tensors and its sizes."""
    rank, alpha, rslora = scaling_of(config, name)
    sizes = {
        "lora_a": (rank, module.in_features),
        "lora_b": (module.out_features, rank),
    }
    for which, size in sizes.items():
        check_size(folder, name, which, pair[which], size)
    check_rank(f"load_adapter: {name}", rank, module.out_features, module.in_features)
    return Shape(rank, alpha, rslora)
