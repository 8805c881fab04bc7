"""Every command of the lab's README runs, with less text, fewer steps and smaller weights."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from qlora_kernels import cli
from qlora_kernels.formats.definitions import import_definitions
from tests.finetune.running import ROOT, write_corpus
from tests.lab.running import needs_minilm, rows, write_weights

PAGE = (ROOT / "qlora_kernels" / "lab" / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("python -m qlora_kernels ")
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
    if line.startswith("python")
]
# Later options win over the page's own.
TEXT = ("--data", "corpus.txt", "--seq-len", "32")
REDUCED = {
    "lab fidelity": ("--samples", "4096"),
    "lab sweep": ("--weights", "gauss", "--samples", "4096", "--formats", "nf4", "bof2s"),
    "lab sensitivity": (*TEXT, "--texts", "1", "--layers", r"layers\.0\.self_attn"),
    "lab init": (*TEXT, "--texts", "1", "--layers", r"layers\.0\.self_attn"),
    "lab train": (*TEXT, "--steps", "1", "--batch", "1"),
    "bench": ("--seconds", "0.01", "--rounds", "1", "--shape", "64x64"),
}


def definition() -> str:
    match = re.search(r"<!-- definition -->\n```python\n(.*?)```", PAGE, re.S)
    assert match
    return match.group(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands are given: with its files, and one cache for all of them."""
    path = tmp_path_factory.mktemp("walk")
    (path / "my_format.py").write_text(definition())
    write_corpus(path / "corpus.txt")
    write_weights(path / "model.safetensors")
    return path


def test_the_page_has_every_command() -> None:
    named = {" ".join(command.split("--")[0].split()[:2]) for command in COMMANDS}
    assert named >= {
        f"lab {name}" for name in ("fidelity", "sweep", "sensitivity", "init", "train")
    }
    assert sum("bench" in shlex.split(command) for command in COMMANDS) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given = shlex.split(command)
    start = 2 if given[0] == "--define" else 0  # before the command's name
    key = "bench" if given[start] == "bench" else " ".join(given[start : start + 2])
    if ("minilm" in given and key != "lab sweep") or given == ["lab", "fidelity"]:
        # The weights of a whole model are another test's.
        given += ["--weights", "gauss"]
    assert cli.main([*given, *REDUCED[key]]) == 0


@needs_minilm
def test_the_format_is_better_than_nf4_on_real_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    command = next(c for c in COMMANDS if "--define" in c and "minilm" in c)
    assert cli.main([*shlex.split(command), "--out", "real"]) == 0
    best, plain = rows(folder / "real", "fidelity")
    for row in (best, plain):  # as on the page
        quoted = re.search(rf"^minilm +{row['format']} .* (-\d+\.\d+) ", PAGE, re.M)
        assert quoted
        assert row["NMSE dB"] == pytest.approx(float(quoted[1]), abs=0.006)
    assert (best["format"], plain["format"]) == ("mine", "nf4")
    assert best["NMSE dB"] < plain["NMSE dB"] - 0.8
    assert best["bits"] < plain["bits"]
    assert best["cosine mean"] > plain["cosine mean"]


def test_the_format_is_one_like_any_other(folder: Path) -> None:
    import_definitions([str(folder / "my_format.py")])
    weight = torch.randn(32, 64)
    assert qlk.quantize(weight, "mine").format == qlk.get_format("mine")
    model = nn.Sequential(nn.Linear(64, 32))
    qlk.replace_linear(model, rank=4, format="mine")
    x = torch.randn(3, 64)
    assert model(x).isfinite().all()


def test_the_assignment_is_what_replace_linear_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's lines, after the page's command, on a model with layers of those names."""
    monkeypatch.chdir(folder)
    command = next(c for c in COMMANDS if "sensitivity" in c)
    assert cli.main([*shlex.split(command), *REDUCED["lab sensitivity"]]) == 0
    match = re.search(r"<!-- assignment -->\n```python\n(.*?)```", PAGE, re.S)
    assert match
    layer, model = nn.Module(), nn.Module()
    layer.self_attn = nn.ModuleDict(
        {f"{name}_proj": nn.Linear(256, 256, bias=False) for name in "qkvo"}
    )
    model.layers = nn.ModuleList([layer])
    exec(match.group(1), {"qlk": qlk, "model": model})
    assert all(isinstance(module, qlk.QLoRALinear) for module in layer.self_attn.values())
