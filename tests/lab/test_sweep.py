"""The Pareto front and the best of a budget, against their definitions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from qlora_kernels.errors import ArgumentError
from qlora_kernels.lab.cache import CellCache
from qlora_kernels.lab.fidelity import Measured, run_fidelity
from qlora_kernels.lab.metrics import Fidelity
from qlora_kernels.lab.sweep import (
    BASELINE,
    SAMPLED,
    best_at,
    front,
    near_front,
    run_sweep,
    sample,
    stored_bits,
    with_baseline,
)
from qlora_kernels.lab.variants import Variant, make_variants
from qlora_kernels.lab.weights import weight_set
from tests.lab.running import needs_minilm, write_weights


def measured(bits: float, error: float, variant: Variant = BASELINE) -> Measured:
    return Measured("set", variant, Fidelity(bits, 0.1, error, 1.0, 4.0))


INT4 = Variant.of("int4", {})


@pytest.mark.parametrize("seed", range(20))
def test_front_is_what_nothing_dominates(seed: int) -> None:
    chance = random.Random(seed)
    # Few values, so that there are ties in both.
    points = [measured(chance.randint(1, 8), -chance.randint(1, 8)) for _ in range(30)]

    def dominated(one: Measured) -> bool:
        return any(
            other.figures.bits <= one.figures.bits
            and other.figures.nmse_db <= one.figures.nmse_db
            and other.figures != one.figures
            for other in points
        )

    wanted = {(p.figures.bits, p.figures.nmse_db) for p in points if not dominated(p)}
    found = [(p.figures.bits, p.figures.nmse_db) for p in front(points)]
    assert found == sorted(wanted)


def test_best_of_a_budget() -> None:
    points = [measured(4.1, -20), measured(4.25, -21, INT4), measured(4.5, -22, INT4)]
    best = best_at(points, 4.25)
    assert best.measured is points[1]
    assert best.gain_db == pytest.approx(1.0)
    assert (
        "best at <= 4.25 bits: int4 b64, -21.00 dB at 4.250 bits, 1.00 dB better" in best.sentence
    )
    assert best_at(points, 4.2).gain_db == 0
    with pytest.raises(ArgumentError, match=r"--budgets must be at least 4\.100"):
        best_at(points, 4)


def test_the_baseline_is_always_there() -> None:
    assert with_baseline([INT4]) == [INT4, BASELINE]
    assert with_baseline([BASELINE, INT4]) == [BASELINE, INT4]


def test_only_variants_near_the_sample_s_front_are_measured() -> None:
    """Within the margin of what as few bits reach; an error far off only where it saves bits."""
    close, far, small = Variant.of("int4", {"block_size": 32}), INT4, Variant.of("fp4", {})
    points = [
        measured(4.1, -20),
        measured(4.2, -21, Variant.of("nf4", {"block_size": 32})),
        measured(4.2, -20.8, close),
        measured(4.3, -20.7, far),
        measured(4.0, -15, small),
    ]
    assert near_front(points, 0.25) == [points[n].variant for n in (0, 1, 2, 4)]
    assert near_front(points, 0.1) == [points[n].variant for n in (0, 1, 4)]
    assert near_front([*points, measured(3.9, -22, far)], 0.1) == [BASELINE, far]


def test_sample_of_a_set(tmp_path: Path) -> None:
    """Rows of some tensors, in the order of the file."""
    path = write_weights(tmp_path / "w.safetensors", count=20)
    weights = weight_set(str(path), 1, 0)
    taken = sample(weights)
    assert taken.numel == 8 * 24 * 96  # whole ones: they are smaller than their share
    names = [source.name for source in weights.sources]
    assert [source.name for source in taken.sources] == names[::2][:8]
    gauss = sample(weight_set("gauss", 1 << 20, 0))
    assert gauss.numel == SAMPLED
    whole = weight_set("gauss", 1 << 20, 0).sources[0].load()
    assert torch.equal(gauss.sources[0].load(), whole[: SAMPLED // 1024])


def test_a_sweep_finds_what_measuring_everything_finds(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "w.safetensors", count=12)
    weights = weight_set(str(path), 1, 0)
    variants, _ = make_variants(["nf4", "int4", "fp4", "kmeans"], {"block_size": [32, 64, 128]})
    with CellCache(tmp_path) as cache:
        swept = run_sweep(weights, variants, cache)
        all_of_them = run_fidelity([weights], variants, cache)
    assert len(swept) < len(all_of_them)
    assert [p.variant for p in front(swept)] == [p.variant for p in front(all_of_them)]
    assert best_at(swept, 4.25) == best_at(all_of_them, 4.25)
    for one in all_of_them:
        assert stored_bits(weights, one.variant) == one.figures.bits


@needs_minilm
def test_best_at_four_and_a_quarter_bits_on_real_weights(tmp_path: Path) -> None:
    """By as much as signed scales and a search for them are worth together."""
    variants, _ = make_variants(["bof4s"], {"block_size": [64], "encoder": ["own", "scale_search"]})
    with CellCache(tmp_path) as cache:
        found = run_fidelity([weight_set("minilm", 1, 0)], with_baseline(variants), cache)
    assert best_at(found, 4.25).gain_db >= 0.9
