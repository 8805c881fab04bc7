"""`lab init`: how much of a format's error each way to start an adapter takes back.

A cell is one layer under one format and one method. With E = W − Ŵ − scaling·B A it holds ‖E‖² and
E‖E x‖² over the calibration text and over other text, which the method has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.errors import argument_error
from qlora_kernels.lab.cache import CellCache, cell_key
from qlora_kernels.lab.console import Bar
from qlora_kernels.lab.metrics import sum_of_squares
from qlora_kernels.lab.studied import StudiedModel
from qlora_kernels.lab.variants import Variant
from qlora_kernels.nn.initialization import AdapterStart, input_moments, start
from qlora_kernels.ops import dequantize, quantize

# Method -> (name in nn.initialization, alternations).
METHODS: dict[str, tuple[str, int]] = {
    "zero": ("zero", 1),
    "loftq-1": ("loftq", 1),
    "loftq-5": ("loftq", 5),
    "qpissa": ("qpissa", 1),
    "qera-diag": ("qera", 1),
    "qera-exact": ("qera", 1),
}
PARTS = ("calibration", "held-out")
NOTES = (
    "weight error: ‖W - Ŵ - s·B·A‖ / ‖W‖ over all layers.",
    "output error: ‖(W - Ŵ - s·B·A) X‖ / ‖W X‖ over all layers, X the inputs on the calibration "
    "text; held out: on text that no method has seen.",
    "zero is QLoRA's own start, B = 0. loftq and qpissa change the stored base, qera does not.",
)


@torch.no_grad()
def compare_starts(
    studied: StudiedModel,
    variants: Sequence[Variant],
    methods: Sequence[str],
    rank: int,
    alpha: float,
    cache: CellCache,
) -> list[dict[str, Any]]:
    """Rows of the table: every method under every variant.

    Args:
        rank, alpha: of the adapters; scaling is alpha / rank.

    Raises:
        ArgumentError: an unknown method, a rank above a layer's smaller side.
    """
    for method in methods:
        if method not in METHODS:
            rule = f"out of {', '.join(METHODS)}"
            raise argument_error("lab init", "--methods", rule, method)
    for name, layer in studied.layers.items():
        if not 1 <= rank <= min(layer.weight.shape):
            rule = f"between 1 and {min(layer.weight.shape)}, the smaller side of {name}"
            raise argument_error("lab init", "--rank", rule, rank)
    if not (math.isfinite(alpha) and alpha > 0):
        raise argument_error("lab init", "--alpha", "positive and finite", alpha)
    scaling = alpha / rank
    digest = studied.digest()

    def key(layer: str, variant: Variant, method: str) -> str:
        return cell_key(
            "init",
            model=digest,
            layer=layer,
            format=variant.digest,
            method=METHODS[method],
            exact=method == "qera-exact",
            rank=rank,
            scaling=scaling,
        )

    wanted = [(name, v, m) for name in studied.layers for v in variants for m in methods]
    missing = [cell for cell in wanted if key(*cell) not in cache.cells]
    moments = second_moments(studied) if missing else {}
    with Bar("init", len(wanted)) as bar:
        bar.step("from the cache", len(wanted) - len(missing))
        for name, variant, method in missing:
            weight = studied.layers[name].weight.detach()
            held = {part: moments[part][name] for part in PARTS}
            cell = measure_start(weight, variant, method, rank, scaling, held)
            cache.put(key(name, variant, method), cell)
            bar.step(f"{name} {variant.label} {method}")
    return [
        row(v, m, [cache.cells[key(name, v, m)] for name in studied.layers])
        for v in variants
        for m in methods
    ]


def second_moments(studied: StudiedModel) -> dict[str, dict[str, Tensor]]:
    """Part -> layer -> E[x xᵀ] [K, K] in fp64."""
    found = {}
    for part in PARTS:
        with input_moments(studied.layers, exact=True) as seen:
            studied.run(part)
        found[part] = seen.moments()
    return found


def measure_start(
    weight: Tensor,
    variant: Variant,
    method: str,
    rank: int,
    scaling: float,
    moments: Mapping[str, Tensor],
) -> dict[str, float]:
    """One cell: squared errors, and the squares they are relative to."""
    calibration = moments["calibration"]
    given = calibration if method == "qera-exact" else calibration.diagonal()
    begin = begun(weight, variant, method, rank, scaling, given)
    product = scaling * (begin.lora_b @ begin.lora_a)
    left = weight.float() - dequantize(begin.qw, torch.float32) - product
    cell = {"error": sum_of_squares(left), "weight": sum_of_squares(weight)}
    for part, second in moments.items():
        cell[f"{part} error"] = output_square(left, second)
        cell[f"{part} output"] = output_square(weight, second)
    return cell


def begun(
    weight: Tensor, variant: Variant, method: str, rank: int, scaling: float, moments: Tensor
) -> AdapterStart:
    """The start of that name."""
    name, steps = METHODS[method]
    if name == "zero":
        rows, columns = weight.shape
        qw = quantize(weight, variant.format)
        return AdapterStart(qw, torch.zeros(rank, columns), torch.zeros(rows, rank))
    return start(name, weight, rank, scaling, variant.format, steps, moments)


def output_square(matrix: Tensor, second: Tensor) -> float:
    """E‖M x‖² = tr(M E[x xᵀ] Mᵀ), in fp64."""
    wide = matrix.double()
    return float(((wide @ second) * wide).sum())


def row(variant: Variant, method: str, cells: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """One line of the table: the layers' cells added up."""

    def relative(error: str, whole: str) -> float:
        squares = [math.fsum(max(cell[name], 0.0) for cell in cells) for name in (error, whole)]
        return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0

    return {
        **variant.columns,
        "method": method,
        "weight error": relative("error", "weight"),
        "output error": relative("calibration error", "calibration output"),
        "held out": relative("held-out error", "held-out output"),
    }
