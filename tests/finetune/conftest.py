"""Fixtures of the `finetune` tests; see `running`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.finetune.running import Command, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.txt")


@pytest.fixture
def command(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, with ``tmp_path`` as the current folder, where the default output goes."""
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, corpus)
