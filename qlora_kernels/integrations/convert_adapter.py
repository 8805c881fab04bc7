"""A PEFT adapter as what it adds to the tensors of a dense checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_kernels.errors import CheckpointError
from qlora_kernels.nn.adapter_parts import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_size,
    read_config,
    read_weights,
    scaling_of,
)
from qlora_kernels.nn.expert_adapter import from_file
from qlora_kernels.nn.replace import is_targeted


@dataclass(frozen=True)
class Delta:
    """What is added to a weight [rows, cols], or to each of a stack's [experts, rows, cols].

    Attributes:
        lora_a: [experts, R, cols], or [experts, R, rows] if transposed; one expert for a matrix.
        lora_b: [experts, rows, R], or [experts, cols, R] if transposed.
        scaling: the factor on B A.
        transposed: (B A)ᵀ is added.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    transposed: bool

    def turned(self, turn: bool = True) -> Delta:
        """What is added to the transposed weight, if `turn`."""
        return replace(self, transposed=self.transposed != turn)

    def matrix(self, expert: int = 0) -> torch.Tensor:
        """ΔW of an expert, fp32 [rows, cols]."""
        product = self.scaling * (self.lora_b[expert].float() @ self.lora_a[expert].float())
        return product.t() if self.transposed else product

    def added(self, dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W + ΔW, summed in fp32 and rounded once; in fp32 is one matrix at a time."""
        if dense.dim() == 2:
            return (dense.float() + self.matrix()).to(dtype)
        result = torch.empty(dense.shape, dtype=dtype)
        for expert, weight in enumerate(dense):
            result[expert] = weight.float() + self.matrix(expert)
        return result


def read_deltas(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    turned: Collection[str],
    is_transposed: Collection[str],
    prefix: str,
    parts: Mapping[str, tuple[int, ...]],
) -> dict[str, Delta]:
    """What an adapter in PEFT's layout adds to a dense model: name of a parameter -> it.

    Args:
        path: the adapter's folder.
        shapes: of the model's parameters, in its order: PEFT nests the wrappers of one module's
            parameters in it.
        turned: names of linear layers that have their weight as [K, N] (Conv1D).
        is_transposed: names of expert modules that say so, by which PEFT takes their stacks for
            [experts, K, N] rather than [experts, N, K].
        prefix: name of the model's body, which an adapter of the body alone leaves out.
        parts: shapes of single experts' matrices by their names in files, which adapters made
            before experts were stacked are for.

    Raises:
        CheckpointError: files that cannot be read, more than A and B, parameters that the model
            lacks or whose sizes differ.
    """
    folder = Path(path)
    config = read_config(folder / CONFIG_NAME, "convert")
    owners = {name.rpartition(".")[0] for name in (*shapes, *parts)}
    weights = {
        _in_model(name, owners, prefix): pair
        for name, pair in read_weights(folder / WEIGHTS_NAME, "convert").items()
    }
    found = _of_parameters(folder, config, weights, shapes, is_transposed)
    unknown = []
    for name, pair in weights.items():
        key = f"{name}.weight"
        shape = shapes.get(key, parts.get(key))
        if shape is None or len(shape) != 2:
            unknown.append(name)
            continue
        found[key] = _delta(folder, config, name, pair, (1, *shape), name in turned)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"convert: {folder} adapts {unknown[0]}{more}, not a layer of SRC")
    return found


def _in_model(name: str, owners: Collection[str], prefix: str) -> str:
    """The name that a module of an adapter's has in the model."""
    bare, wrapper, depth = name.partition(".base_layer")
    for candidate in (bare, bare.removeprefix(f"{prefix}."), f"{prefix}.{bare}"):
        if candidate in owners:
            return candidate + wrapper + depth
    return name


def _of_parameters(
    folder: Path,
    config: Mapping[str, Any],
    weights: dict[str, dict[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    is_transposed: Collection[str],
) -> dict[str, Delta]:
    """The adapters of target_parameters, taken out of `weights`."""
    targets = tuple(config.get("target_parameters") or ())
    adapted: dict[str, list[str]] = {}
    for name in shapes:
        if is_targeted(name, targets):
            adapted.setdefault(name.rpartition(".")[0], []).append(name)
    found = {}
    for module, names in adapted.items():
        # The first parameter's wrapper is innermost: around it are those of the others.
        for depth, name in enumerate(reversed(names)):
            pair = weights.pop(module + ".base_layer" * depth, None)
            if pair is None:
                raise CheckpointError(
                    f"convert: {folder / WEIGHTS_NAME} must hold A and B of {name}, got none"
                )
            stacked = shapes[name] if len(shapes[name]) == 3 else (1, *shapes[name])
            swapped = len(shapes[name]) == 3 and module in is_transposed
            found[name] = _delta(folder, config, name, pair, stacked, swapped)
    return found


def _delta(
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    pair: Mapping[str, torch.Tensor],
    shape: tuple[int, ...],
    transposed: bool,
) -> Delta:
    """The sum of a parameter of that shape [experts, rows, cols]."""
    rank, alpha, rslora = scaling_of(config, name)
    experts, rows, cols = shape
    outputs, inputs = (cols, rows) if transposed else (rows, cols)
    for which, size in (
        ("lora_a", (experts * rank, inputs)),
        ("lora_b", (outputs, experts * rank)),
    ):
        check_size(folder, name, which, pair[which], size, "convert")
    a, b = from_file(pair["lora_a"], pair["lora_b"], experts, swapped=False)
    return Delta(a, b, alpha / (math.sqrt(rank) if rslora else rank), transposed)
