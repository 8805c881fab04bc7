"""Which format each layer gets: the least total error within a budget of bits, found exactly.

Minimise Σ error[l, v]·x[l, v] over x in {0, 1}, with Σ_v x[l, v] = 1 for every layer l and
Σ bytes[l, v]·x[l, v] within the budget: an integer program, which HiGHS solves (scipy's milp).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_kernels.errors import CheckpointError, QLKError, argument_error
from qlora_kernels.formats import Format, QuantizedWeight
from qlora_kernels.lab.outputs import write_json
from qlora_kernels.lab.sensitivity import Cost, realised_error
from qlora_kernels.lab.studied import StudiedModel
from qlora_kernels.lab.variants import Variant

KIND = "qlora_kernels.lab.assignment/1"


def solve(costs: Mapping[str, Sequence[Cost]], budget: float) -> dict[str, Cost]:
    """Layer -> the cost of the variant it gets.

    Args:
        costs: layer -> its variants' costs.
        budget: stored bits a weight, over all layers together; met to a part in a million.

    Raises:
        ArgumentError: not even the smallest variants fit.
        QLKError: scipy is not installed, or found no solution.
    """
    flat = [cost for layer in costs.values() for cost in layer]
    weights = sum(layer[0].numel for layer in costs.values())
    check_budget(
        budget, sum(min(cost.nbytes for cost in layer) for layer in costs.values()), weights
    )
    allowed = budget * weights / 8
    kept = {name: list(layer) for name, layer in costs.items()}
    scale = max(total(flat), 1e-300)
    while True:
        picked = solve_scaled(kept, allowed, scale)
        found = total(list(picked.values()))
        # The solver's tolerances are absolute. A layer's error alone above all of this solution's
        # is in no better one: without those, and in units of this solution's, it sees finer
        # differences.
        if found == 0 or found > scale / 2:
            return picked
        scale = found
        kept = {
            name: [cost for cost in layer if cost.error <= found or cost is picked[name]]
            for name, layer in kept.items()
        }


def check_budget(budget: float, least: int, weights: int) -> None:
    """Raises ArgumentError for a budget that ``least`` bytes for so many weights do not fit in."""
    if not (math.isfinite(budget) and least <= budget * weights / 8 * (1 + 1e-12)):
        rule = f"at least {8 * least / weights:.4f}, what the smallest formats take"
        raise argument_error("lab sensitivity", "--budget", rule, budget)


def check_budget_of(studied: StudiedModel, variants: Sequence[Variant], budget: float) -> None:
    """The same before anything is measured, by what will be stored."""
    least = weights = 0
    for layer in studied.layers.values():
        shape, dtype = tuple(layer.weight.shape), layer.weight.dtype
        least += min(QuantizedWeight.empty(shape, dtype, v.format).nbytes for v in variants)
        weights += layer.weight.numel()
    check_budget(budget, least, weights)


def solve_scaled(
    costs: Mapping[str, Sequence[Cost]], allowed: float, scale: float
) -> dict[str, Cost]:
    """The integer program with errors in units of ``scale`` / 10^4; ``allowed`` bytes."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise QLKError(
            "lab sensitivity: scipy must be installed: pip install 'qlora_kernels[lab]'"
        ) from error
    flat = [cost for layer in costs.values() for cost in layer]
    one_each = np.zeros((len(costs), len(flat)))
    column = 0
    for row, layer in enumerate(costs.values()):
        one_each[row, column : column + len(layer)] = 1
        column += len(layer)
    errors = np.array([max(cost.error, 0.0) for cost in flat])
    sizes = np.array([cost.nbytes for cost in flat]) / allowed
    solution = milp(
        errors / scale * 1e4,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None], 0, 1)],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise QLKError(f"lab sensitivity: no assignment was found ({solution.message})")
    picked = [cost for cost, taken in zip(flat, solution.x, strict=True) if taken > 0.5]
    return {cost.layer: cost for cost in picked}


def total(picked: Sequence[Cost]) -> float:
    """The sum of errors; one below 0 is the rounding of one near it."""
    return sum(max(cost.error, 0.0) for cost in picked)


def best_uniform(costs: Mapping[str, Sequence[Cost]], budget: float) -> dict[str, Cost] | None:
    """The one variant that, given to every layer, costs least within the budget; None if none
    fits."""
    layers = list(costs.values())
    candidates = [
        [layer[index] for layer in layers]
        for index in range(len(layers[0]))
        if bits_of([layer[index] for layer in layers]) <= budget + 1e-9
    ]
    if not candidates:
        return None
    best = min(candidates, key=total)
    return {cost.layer: cost for cost in best}


def compared(
    studied: StudiedModel,
    costs: Mapping[str, Sequence[Cost]],
    picked: Mapping[str, Cost],
    budget: float,
    metric: str,
) -> list[dict[str, Any]]:
    """Rows: the mixed assignment, the best uniform one, the registry's nf4 if it was measured, and
    the dense model; what was predicted of them, and what comes out with all layers quantized."""
    uniform = best_uniform(costs, budget)
    nf4 = uniform_of(costs, Variant.of("nf4", {}))
    named = {"mixed": picked, "best uniform": uniform, "nf4": nf4}
    rows: list[dict[str, Any]] = []
    for name, assigned in named.items():
        if assigned is None:
            continue
        used = list(assigned.values())
        variants = {layer: cost.variant for layer, cost in assigned.items()}
        error, loss = realised_error(studied, variants, metric)
        row = {
            "assignment": name,
            "formats": ", ".join(sorted({cost.variant.label for cost in used})),
            "bits": bits_of(used),
            "predicted error": total(used),
            "realised error": error,
        }
        rows.append(row if loss is None else {**row, "held-out loss": loss})
    rows.append({"assignment": "dense", "predicted error": 0.0, "realised error": 0.0})
    loss = studied.loss()
    if loss is not None:
        rows[-1]["held-out loss"] = loss
    return rows


def uniform_of(costs: Mapping[str, Sequence[Cost]], variant: Variant) -> dict[str, Cost] | None:
    """Every layer's cost under one variant, or None where it was not measured."""
    found = {
        layer: cost
        for layer, options in costs.items()
        for cost in options
        if cost.variant.digest == variant.digest
    }
    return found if len(found) == len(costs) else None


def bits_of(picked: Sequence[Cost]) -> float:
    """Stored bits a weight over these layers."""
    return 8 * sum(cost.nbytes for cost in picked) / sum(cost.numel for cost in picked)


def write_assignment(path: Path, picked: Mapping[str, Cost], facts: Mapping[str, Any]) -> Path:
    """Write what `load_assignment` reads."""
    layers = {name: cost.variant.to_json() for name, cost in picked.items()}
    return write_json(path, {"kind": KIND, **facts, "layers": layers})


def load_assignment(path: str | Path) -> dict[str, Format]:
    """Layer -> Format, as `replace_linear(model, format=…)` takes it.

    Raises:
        CheckpointError: the file cannot be read or is not an assignment.
        ArgumentError: a format in it is not registered here.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"lab: {path} cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CheckpointError(f"lab: {path} is not an assignment of formats")
    return {
        name: Variant.from_json(value).format for name, value in dict(content["layers"]).items()
    }
