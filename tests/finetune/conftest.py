"""Fixtures of the `finetune` tests; see `running`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.finetune.running import Command, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.txt")


@pytest.fixture(scope="module", autouse=True)
def collecting_little() -> Iterator[None]:
    """Every run collects garbage, and would look at all that the test process has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def plots() -> None:
    """For tests of what a run draws; in the others' processes none draws anything."""


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("qlora_kernels.finetune.plots.write_plots", lambda *_: [])


@pytest.fixture
def command(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, with ``tmp_path`` as the current folder, where the default output goes."""
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, corpus)
