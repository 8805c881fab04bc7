"""`lab sensitivity`: what it costs to quantize each layer alone; `assignment` then chooses a format
for each.

A cell is one layer under one variant. "output" measures the layer's own output, ‖X(Ŵ − W)ᵀ‖² /
‖XWᵀ‖²; "model" what the model makes of it, see `studied`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.lab.cache import CellCache, cell_key
from qlora_kernels.lab.console import Bar
from qlora_kernels.lab.metrics import sum_of_squares
from qlora_kernels.lab.studied import StudiedModel
from qlora_kernels.lab.variants import Variant
from qlora_kernels.ops import dequantize, quantize

METRICS = ("model", "output")
# Rows of a layer's input that its output is measured on, evenly spaced over the calibration text.
MAX_ROWS = 1024
NOTES = (
    "predicted error: the sum of what the layers cost when each is quantized alone.",
    "realised error: with all layers quantized at once.",
)


@dataclass(frozen=True)
class Cost:
    """Of one layer under one variant.

    Attributes:
        layer, variant: which.
        numel, nbytes: weights, and bytes stored of them.
        error: in the metric's unit.
    """

    layer: str
    variant: Variant
    numel: int
    nbytes: int
    error: float

    @property
    def row(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            **self.variant.columns,
            "bits": 8 * self.nbytes / self.numel,
            "error": self.error,
        }


@torch.no_grad()
def measure_layers(
    studied: StudiedModel, variants: Sequence[Variant], metric: str, cache: CellCache
) -> dict[str, list[Cost]]:
    """Layer -> its cost under each variant, in their order."""
    digest = studied.digest()

    def key(layer: str, variant: Variant) -> str:
        return cell_key(
            "sensitivity", model=digest, metric=metric, layer=layer, format=variant.digest
        )

    pending = {
        name: [v for v in variants if key(name, v) not in cache.cells] for name in studied.layers
    }
    total = len(studied.layers) * len(variants)
    with Bar("sensitivity", total) as bar:
        bar.step("from the cache", total - sum(map(len, pending.values())))
        inputs = (
            layer_inputs(studied, [name for name in pending if pending[name]])
            if metric == "output"
            else {}
        )
        for name, left in pending.items():
            weight = studied.layers[name].weight
            for variant in left:
                qw = quantize(weight, variant.format)
                dense = dequantize(qw, torch.float32)
                if metric == "output":
                    error = output_error(inputs[name], weight, dense)
                else:
                    with studied.weights({name: dense}):
                        error = studied.error()
                cell = {"numel": qw.numel, "nbytes": qw.nbytes, "error": error}
                cache.put(key(name, variant), cell)
                bar.step(f"{name} {variant.label}")
    return {
        name: [Cost(name, v, **cache.cells[key(name, v)]) for v in variants]
        for name in studied.layers
    }


def output_error(x: Tensor, weight: Tensor, dense: Tensor) -> float:
    """‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖²; x [rows, K]."""
    exact = weight.float()
    lost = sum_of_squares(x @ (dense - exact).t())
    return lost / sum_of_squares(x @ exact.t())


def layer_inputs(studied: StudiedModel, names: Sequence[str]) -> dict[str, Tensor]:
    """What these layers are given on the calibration text: fp32 [rows, K], thinned out."""
    return captured(studied, {name: studied.layers[name] for name in names}, 0)


def layer_outputs(studied: StudiedModel) -> dict[str, Tensor]:
    """What every layer gives on the same rows: fp32 [rows, N], without the bias."""
    found = captured(studied, studied.layers, 1)
    for name, layer in studied.layers.items():
        if layer.bias is not None:
            found[name] = found[name] - layer.bias.float()
    return found


def captured(
    studied: StudiedModel, layers: Mapping[str, nn.Linear], which: int
) -> dict[str, Tensor]:
    """The inputs (0) or outputs (1) of layers, at most `MAX_ROWS` rows of each."""
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, inputs: Any, output: Any) -> None:
        seen = (inputs[0], output)[which].detach()
        parts[name].append(seen.reshape(-1, seen.shape[-1]).float())

    hooks = [
        layer.register_forward_hook(lambda _, x, y, name=name: keep(name, x, y))
        for name, layer in layers.items()
    ]
    try:
        studied.run("calibration")
    finally:
        for hook in hooks:
            hook.remove()
    return {name: thinned(torch.cat(rows)) for name, rows in parts.items()}


def thinned(rows: Tensor) -> Tensor:
    """At most `MAX_ROWS` rows, evenly spaced."""
    if len(rows) <= MAX_ROWS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, MAX_ROWS).long()].clone()


@torch.no_grad()
def realised_error(
    studied: StudiedModel, assigned: Mapping[str, Variant], metric: str
) -> tuple[float, float | None]:
    """The error with every layer quantized at once, in the metric's unit, and the model's loss.

    For "output" it is the sum over the layers of how far their outputs have moved, their inputs
    being those that the layers before them now give.
    """
    before = layer_outputs(studied) if metric == "output" else {}
    replaced = {
        name: dequantize(quantize(studied.layers[name].weight, v.format), torch.float32)
        for name, v in assigned.items()
    }
    with studied.weights(replaced):
        loss = studied.loss()
        if metric == "model":
            return studied.error(), loss
        after = layer_outputs(studied)
    moved = [
        sum_of_squares(after[name] - exact) / sum_of_squares(exact)
        for name, exact in before.items()
    ]
    return sum(moved), loss
