"""`python -m qlora_kernels lab`: files, what is printed, exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kernels import Format, cli
from qlora_kernels.lab import fidelity
from qlora_kernels.lab.metrics import Sums
from qlora_kernels.lab.weights import DRAWN
from tests.finetune.running import write_corpus
from tests.lab.running import lab, matrix, needs_minilm, rows, write_weights

PNG = b"\x89PNG"
SMALL = ("--samples", "4096", "--formats", "nf4", "int4", "--block-sizes", "32", "64")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_weights(tmp_path / "w.safetensors")
    write_corpus(tmp_path / "corpus.txt")
    return tmp_path


def test_fidelity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab("fidelity", "--weights", *DRAWN, "w.safetensors", *SMALL) == 0
    out = folder / "out" / "lab" / "fidelity"
    found = rows(out, "fidelity")
    assert len(found) == 3 * 4
    assert [row["weights"] for row in found[::4]] == ["gauss", "student", "w.safetensors"]
    for start in (0, 4, 8):
        errors = [row["NMSE dB"] for row in found[start : start + 4]]
        assert errors == sorted(errors)
    with (out / "fidelity.csv").open(encoding="utf-8", newline="") as file:
        held = list(csv.DictReader(file))
    assert [float(row["relative error"]) for row in held] == [r["relative error"] for r in found]
    page = (out / "fidelity.md").read_text(encoding="utf-8")
    assert page.count("\n| ") == 1 + 1 + 12  # header, rule, rows
    for name in ("gauss", "student", "w.safetensors"):
        assert f"(fidelity-{name}.png)" in page
        assert (out / f"fidelity-{name}.png").read_bytes().startswith(PNG)
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 13
    assert "fidelity: 4 variants on" in told.err


def test_the_same_again_computes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("fidelity", "--weights", "gauss", *SMALL)
    assert lab(*options) == 0
    first = rows(folder / "out/lab/fidelity", "fidelity")
    assert "4 cells computed" in capsys.readouterr().err
    assert lab(*options) == 0
    assert "0 cells computed" in capsys.readouterr().err
    assert rows(folder / "out/lab/fidelity", "fidelity") == first
    assert lab(*options, "--seed", "1") == 0
    assert "4 cells computed" in capsys.readouterr().err


def test_changed_weights_are_computed_anew(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same file name, same tensor names, one tensor changed."""
    path = folder / "x.safetensors"
    save_file({"a": matrix(1), "b": matrix(2)}, path)
    options = ("fidelity", "--weights", str(path), *SMALL)
    assert lab(*options) == 0
    save_file({"a": matrix(1), "b": matrix(2) + 1e-3}, path)
    capsys.readouterr()
    assert lab(*options) == 0
    assert "4 cells computed" in capsys.readouterr().err


def test_sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--scale-stores", "fp32", "double_quant", "--encoders", "own")
    assert lab("sweep", "--weights", "gauss", *SMALL, *options, "--budgets", "4.15", "4.5") == 0
    out = folder / "out" / "lab" / "sweep"
    content = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    near = {(row["format"], row["block_size"], row["scale_store"]) for row in content["all"]}
    # int4 is worse at the same bits; nf4's blocks of 64 with fp32 scales than those of 32 without.
    assert near == {("nf4", 64, "double_quant"), ("nf4", 32, "double_quant"), ("nf4", 32, "fp32")}
    assert [best["budget"] for best in content["best"]] == [4.15, 4.5]
    front = content["rows"]
    assert [row["bits"] for row in front] == sorted(row["bits"] for row in front)
    assert [row["NMSE dB"] for row in front] == sorted((r["NMSE dB"] for r in front), reverse=True)
    assert (out / "sweep-gauss.png").read_bytes().startswith(PNG)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("gauss: best at <= 4.15 bits: nf4 b64, ")
    assert lines[-1].startswith("gauss: best at <= 4.5 bits: nf4 b32, ")


def test_sensitivity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--layers", r"layers\.0\.mlp", "--texts", "2", "--seq-len", "32")
    budget = ("--data", "corpus.txt", "--budget", "4.2", *SMALL[2:])
    assert lab("sensitivity", *options, *budget) == 0
    out = folder / "out" / "lab" / "sensitivity"
    assert len(rows(out, "layers")) == 3 * 4
    assigned = json.loads((out / "assignment.json").read_text(encoding="utf-8"))
    assert sorted(assigned["layers"]) == [f"layers.0.mlp.{n}_proj" for n in ("down", "gate", "up")]
    found = {row["assignment"]: row for row in rows(out, "sensitivity")}
    assert found["mixed"]["bits"] <= 4.2 + 1e-6
    assert found["mixed"]["realised error"] > 0
    assert (out / "sensitivity.png").read_bytes().startswith(PNG)
    assert "3 layers x 4 variants" in capsys.readouterr().err


def test_init(folder: Path) -> None:
    options = ("--layers", r"layers\.0\.self_attn", "--texts", "2", "--seq-len", "32")
    chosen = ("--data", "corpus.txt", "--formats", "nf4", "--methods", "zero", "loftq-1")
    assert lab("init", *options, *chosen, "--rank", "4") == 0
    out = folder / "out" / "lab" / "init"
    zero, loftq = rows(out, "init")
    assert loftq["weight error"] < zero["weight error"]
    assert (out / "init.png").read_bytes().startswith(PNG)


def test_train(folder: Path) -> None:
    options = ("--steps", "2", "--batch", "2", "--seq-len", "32", "--rank", "4")
    assert lab("train", "--data", "corpus.txt", "--formats", "nf4", *options) == 0
    out = folder / "out" / "lab" / "train"
    assert [row["format"] for row in rows(out, "train")] == ["lora", "nf4"]
    assert (out / "train.png").read_bytes().startswith(PNG)


def test_without_matplotlib(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert lab("fidelity", "--weights", "gauss", *SMALL) == 0
    assert "matplotlib is missing" in capsys.readouterr().err
    assert not list(folder.rglob("*.png"))
    assert "png" not in (folder / "out/lab/fidelity/fidelity.md").read_text(encoding="utf-8")


@needs_minilm
def test_embeddings_of_the_real_model(folder: Path) -> None:
    """Fewer errors in the weights, less of a turn of the embeddings."""
    options = ("--weights", "minilm", "--formats", "nf4", "--block-sizes", "32", "4096")
    assert lab("fidelity", *options) == 0
    fine, coarse = rows(folder / "out/lab/fidelity", "fidelity")
    assert (fine["block_size"], coarse["block_size"]) == (32, 4096)
    assert 1 > fine["cosine mean"] > coarse["cosine mean"] > 0.8
    assert fine["cosine min"] <= fine["cosine mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("fidelity", "--weights", "no.safetensors"), "lab: --weights must be gauss, student"),
        (("fidelity", "--weights", "ids.safetensors"), "a file with 2-D tensors"),
        (("fidelity", "--weights", "corpus.txt"), "not a safetensors file"),
        (("fidelity", "--weights", "gauss", "--samples", "0"), "--samples must be at least 1"),
        (("fidelity", "--formats", "nf5"), "got 'nf5'"),
        (("fidelity", "--block-sizes", "48"), "--block-sizes must be a power of two"),
        (("fidelity", "--block-sizes", "many"), "--block-sizes must be a power of two"),
        (("fidelity", "--scale-stores", "fp31"), "--scale-stores must be own, all"),
        (("fidelity", "--define", "no.py"), "--define must be a Python file, got no.py"),
        (("fidelity", "--exclude", "("), "--exclude must be a regular expression"),
        (("sweep", "--weights", "gauss", "--budgets", "1"), "--budgets must be at least"),
        (("sweep", "--budgets", "many"), "invalid float value"),
        (("sensitivity", "--budget", "1"), "--budget must be at least"),
        (("sensitivity", "--budget", "nan"), "--budget must be at least"),
        (("sensitivity", "--layers", "nothing"), "--layers must be found in"),
        (("sensitivity", "--texts", "0"), "--texts must be at least 1"),
        (("sensitivity", "--metric", "other"), "invalid choice"),
        (("init", "--rank", "0"), "--rank must be between"),
        (("init", "--methods", "best"), "--methods must be out of"),
        (("init", "--model", "no/such/model"), "--model"),
        (("train", "--steps", "0"), "--steps must be at least 1"),
        (("train", "--formats", "nf5"), "got 'nf5'"),
        (("train", "--data", "nowhere.txt"), "nowhere.txt"),
        ((), "the following arguments are required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_an_exit_code(
    options: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"ids": torch.zeros(4, 4, dtype=torch.int64)}, folder / "ids.safetensors")
    quick = {
        "sweep": ("--samples", "4096", "--formats", "nf4"),
        "sensitivity": ("--formats", "nf4", "--seq-len", "32", "--data", "corpus.txt"),
        "init": ("--formats", "nf4", "--seq-len", "32", "--data", "corpus.txt"),
    }
    extra = quick.get(options[0], ()) if options else ()
    if options[:1] == ("sensitivity",) and "--budget" in options:
        extra = (*extra, "--layers", r"layers\.0\.self_attn\.q", "--texts", "1")
    code = lab(*options[:1], *extra, *options[1:])
    assert code in (1, 2)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert message in told[0]


def test_interrupted_it_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after three cells: 130, and the next run computes the rest."""
    real, seen = fidelity.measure, 0

    def measure(weight: torch.Tensor, format: Format) -> tuple[Sums, torch.Tensor]:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise KeyboardInterrupt
        return real(weight, format)

    monkeypatch.setattr(fidelity, "measure", measure)
    options = ("fidelity", "--weights", "w.safetensors", *SMALL)
    assert lab(*options) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert lab(*options) == 0
    assert "13 cells computed" in capsys.readouterr().err  # of 4 tensors under 4 variants


def test_definitions_before_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For every command, as they are run before the options are read."""
    definition = "import qlora_kernels as q; q.register_format(q.Codebook('lab_early', [-1, 0, 1]))"
    (folder / "early.py").write_text(definition)
    given = ["--define", "early.py", "lab", "fidelity", "--formats", "lab_early"]
    assert cli.main([*given, "--weights", "gauss", "--samples", "4096"]) == 0
    assert cli.main(["--define", "nowhere.py", "info"]) == 2
    assert "--define must be a Python file, got nowhere.py" in capsys.readouterr().err
