"""`lab sweep`: of all variants on a set of weights, the best of each size.

A variant is on the Pareto front when no other has an error as low at as few bits. Most of some
hundred combinations are far from it, which a sample of the weights shows: only those near the
sample's front are measured on all weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kernels.errors import argument_error
from qlora_kernels.formats import QuantizedWeight
from qlora_kernels.lab.cache import CellCache
from qlora_kernels.lab.fidelity import Measured, run_fidelity
from qlora_kernels.lab.variants import Variant
from qlora_kernels.lab.weights import Source, WeightSet

BASELINE = Variant.of("nf4", {})
# Bits are sums of quotients; the last digits of a budget like 4.127 are no reason to refuse.
SLACK = 1e-9
# Weights in the sample, and tensors that they are taken from.
SAMPLED = 1 << 19
SAMPLED_TENSORS = 8
# How far, in dB, a variant may be from the sample's front. On MiniLM's weights the sample misjudges
# the difference of two variants by up to 0.03 dB at one block size and 0.1 dB between two.
MARGIN_DB = 0.15


@dataclass(frozen=True)
class Best:
    """What a budget buys on a set, and how much more that is than the baseline."""

    weights: str
    budget: float
    measured: Measured
    gain_db: float

    @property
    def row(self) -> dict[str, Any]:
        held = self.measured.row
        return {"budget": self.budget, **held, f"dB below {BASELINE.label}": self.gain_db}

    @property
    def sentence(self) -> str:
        figures = self.measured.figures
        return (
            f"{self.weights}: best at <= {self.budget:g} bits: {self.measured.variant.label}, "
            f"{figures.nmse_db:.2f} dB at {figures.bits:.3f} bits, {self.gain_db:.2f} dB better "
            f"than {BASELINE.label}"
        )


def sample(weights: WeightSet) -> WeightSet:
    """The first rows of some tensors, evenly spaced over the set; about `SAMPLED` weights."""
    chosen = weights.sources[:: max(1, len(weights.sources) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]
    share = SAMPLED // len(chosen)

    def first_rows(source: Source) -> Source:
        rows = min(source.shape[0], -(-share // source.shape[1]))
        shape = (rows, *source.shape[1:])
        return Source(source.name, shape, lambda: source.load()[:rows].clone())

    return WeightSet(f"{weights.name}, sample", [first_rows(source) for source in chosen])


def near_front(measured: Sequence[Measured], margin: float) -> list[Variant]:
    """The variants within a margin in dB of the least error at no more bits, and the baseline."""
    best = front(measured)

    def excess(one: Measured) -> float:
        return one.figures.nmse_db - min(
            other.figures.nmse_db for other in best if other.figures.bits <= one.figures.bits
        )

    return [
        one.variant
        for one in measured
        if excess(one) <= margin or one.variant.digest == BASELINE.digest
    ]


def run_sweep(
    weights: WeightSet, variants: Sequence[Variant], cache: CellCache, margin: float = MARGIN_DB
) -> list[Measured]:
    """The variants near the front of a set, measured on all of it; the baseline among them.

    Raises as `run_fidelity`.
    """
    screened = run_fidelity([sample(weights)], variants, cache)
    # Tables that are stored with a weight, or with its rows, weigh more on a small sample.
    sized = [
        dataclasses.replace(
            one,
            figures=dataclasses.replace(one.figures, bits=stored_bits(weights, one.variant)),
        )
        for one in screened
    ]
    return run_fidelity([weights], near_front(sized, margin), cache)


def stored_bits(weights: WeightSet, variant: Variant) -> float:
    """Bits a weight of the whole set, by the sizes of what will be stored."""
    nbytes = sum(
        QuantizedWeight.empty(source.shape, torch.float32, variant.format).nbytes
        for source in weights.sources
    )
    return 8 * nbytes / weights.numel


def front(measured: Sequence[Measured]) -> list[Measured]:
    """The Pareto front of one set's variants, by rising bits and falling error."""
    ordered = sorted(measured, key=lambda one: (one.figures.bits, one.figures.nmse_db))
    found: list[Measured] = []
    for one in ordered:
        if not found or one.figures.nmse_db < found[-1].figures.nmse_db:
            found.append(one)
    return found


def best_at(measured: Sequence[Measured], budget: float) -> Best:
    """The variant with the least error within a budget of bits.

    Args:
        measured: one set's variants, the baseline among them.

    Raises:
        ArgumentError: none is that small.
    """
    baseline = next(one for one in measured if one.variant.digest == BASELINE.digest)
    fitting = [one for one in measured if one.figures.bits <= budget + SLACK]
    if not fitting:
        least = min(one.figures.bits for one in measured)
        rule = f"at least {least:.3f}, what the smallest variant takes"
        raise argument_error("lab sweep", "--budgets", rule, budget)
    best = min(fitting, key=lambda one: (one.figures.nmse_db, one.figures.bits))
    gain = baseline.figures.nmse_db - best.figures.nmse_db
    return Best(best.weights, budget, best, gain)


def with_baseline(variants: Sequence[Variant]) -> list[Variant]:
    """The variants, the baseline added where it is not among them."""
    known = {variant.digest for variant in variants}
    return [*variants, *([] if BASELINE.digest in known else [BASELINE])]
