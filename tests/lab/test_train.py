"""Short fine-tunes: one folder a run, finished ones kept, edited formats run anew."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_kernels import Codebook, register_format
from qlora_kernels.errors import ArgumentError
from qlora_kernels.finetune.interrupt import Interrupted, StopRequest
from qlora_kernels.finetune.settings import Settings
from qlora_kernels.lab import train
from qlora_kernels.lab.train import Trained, default_settings, folder_name, settings_of
from qlora_kernels.lab.variants import Variant
from tests.finetune.running import write_corpus

NF4 = Variant.of("nf4", {})
COARSE = [-1, 0, 1]
OPTIONS: dict[str, Any] = {"steps": 6, "batch": 2, "seq_len": 32, "rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trained]]:
    """The base with adapters, nf4 and a format of three values, six steps each."""
    folder = tmp_path_factory.mktemp("train")
    write_corpus(folder / "corpus.txt")
    register_format(Codebook("lab_coarse", values=COARSE))
    variants = [NF4, Variant.of("lab_coarse", {"block_size": 32})]
    return folder, train.train_variants(variants, settings(folder), StopRequest())


def settings(folder: Path, **given: Any) -> Settings:
    options = {**OPTIONS, **given}
    return default_settings(folder / "out", data=(str(folder / "corpus.txt"),), **options)


def test_losses_of_each_format(runs: tuple[Path, list[Trained]]) -> None:
    _, (lora, nf4, coarse) = runs
    assert [one.label for one in (lora, nf4, coarse)] == ["lora", "nf4 b64", "lab_coarse b32"]
    before = [one.report["eval_loss_before"] for one in (lora, nf4, coarse)]
    assert before[0] < before[1] < before[2]
    for one in (lora, nf4, coarse):
        assert len(one.report["train_losses"]) == 6
        assert one.row["loss after"] < one.row["loss before"]
    assert lora.row["bits"] is None
    assert nf4.row["bits"] == pytest.approx(4.127, abs=1e-3)
    assert coarse.row["block_size"] == 32


def test_a_finished_run_is_not_repeated(
    runs: tuple[Path, list[Trained]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trained = runs
    monkeypatch.setattr("qlora_kernels.finetune.run.fit", None)  # would be called
    again = train.train_variants([NF4], settings(folder), StopRequest())
    assert [one.report for one in again] == [one.report for one in trained[:2]]


def test_what_decides_the_result_is_in_the_folder_s_name(tmp_path: Path) -> None:
    own = settings(tmp_path)
    named = [settings_of(own, NF4).out.name, settings_of(settings(tmp_path, steps=7), NF4).out.name]
    first = Variant("x", (), NF4.format)
    edited = Variant("x", (), NF4.format.override(block_size=32))
    named += [folder_name(own, first), folder_name(own, edited)]
    assert len(set(named)) == 4
    assert named[0].startswith("nf4-b64-")


def test_scale_stores_are_the_formats_own(tmp_path: Path) -> None:
    """finetune's default would double-quantize what is stored in fp32."""
    fp32 = Variant.of("nf4", {"scale_store": "fp32"})
    own = settings_of(settings(tmp_path), fp32)
    assert own.double_quant is False
    assert own.format == fp32.label  # registered under it


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--steps must be at least 1"):
        settings(tmp_path, steps=0)


def test_interrupted_it_goes_on(tmp_path: Path) -> None:
    """Stopped after a step, the same command ends with the losses of an uninterrupted run."""
    write_corpus(tmp_path / "corpus.txt")
    stop = StopRequest()
    stop.signal = signal.SIGINT
    with pytest.raises(Interrupted, match=r"while lora was trained; the same command") as stopped:
        train.train_variants([], settings(tmp_path), stop)
    assert stopped.value.exit_code == 130
    (lora,) = train.train_variants([], settings(tmp_path), StopRequest())
    whole = default_settings(tmp_path / "whole", **OPTIONS, data=(str(tmp_path / "corpus.txt"),))
    (unbroken,) = train.train_variants([], whole, StopRequest())
    assert lora.report["train_losses"] == unbroken.report["train_losses"]
