"""Cells are kept, whole or not at all, and only for what they were computed of."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch

from qlora_kernels import Codebook, Format, get_format
from qlora_kernels.errors import QLKError
from qlora_kernels.lab import cache as cache_module
from qlora_kernels.lab.cache import CellCache, cell_key, make_line, parse_line, tensor_digest
from qlora_kernels.lab.variants import Variant
from tests.lab.running import lab, matrix, rows, start, write_weights


def test_cells_are_there_again(tmp_path: Path) -> None:
    with CellCache(tmp_path) as cache:
        assert cache.cell("a", lambda: {"x": 1.5}) == {"x": 1.5}
        assert cache.cell("a", lambda: {"x": 2.5}) == {"x": 1.5}
        assert (cache.computed, cache.reused) == (1, 1)
    with CellCache(tmp_path) as cache:
        assert cache.get("a") == {"x": 1.5}
        assert cache.get("b") is None


def test_every_cut_of_the_file_keeps_whole_cells(tmp_path: Path) -> None:
    """Wherever writing ended, the lines before are there, the one that was cut short is not, and
    what is written next is."""
    lines = [make_line(f"key{number}", {"value": number / 3}) for number in range(3)]
    whole = b"".join(lines)
    for length in range(len(whole)):
        (tmp_path / "cells.jsonl").write_bytes(whole[:length])
        with CellCache(tmp_path) as cache:
            kept = [f"key{n}" for n in range(3) if len(b"".join(lines[: n + 1])) - 1 <= length]
            assert list(cache.cells) == kept, length
            cache.put("next", {"value": 9})
        with CellCache(tmp_path) as cache:
            assert list(cache.cells) == [*kept, "next"], length


def test_a_damaged_line_is_not_read() -> None:
    line = make_line("key", {"value": 1234})
    assert parse_line(line[:-1]) == ("key", {"value": 1234})
    for position in range(len(line) - 1):
        damaged = line[:position] + bytes([line[position] ^ 1]) + line[position + 1 : -1]
        assert parse_line(damaged) is None


def test_no_cell_holds_a_figure_that_json_lacks(tmp_path: Path) -> None:
    with CellCache(tmp_path) as cache, pytest.raises(ValueError, match="JSON compliant"):
        cache.put("a", {"x": float("nan")})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QLKError, match="cannot use the cache"):
        CellCache(tmp_path / "file")


def test_digest_of_a_tensor_is_of_its_content() -> None:
    weight = matrix(1)
    assert tensor_digest(weight) == tensor_digest(weight.clone())
    assert tensor_digest(weight.t()) == tensor_digest(weight.t().contiguous())
    others = [weight.t(), weight.reshape(48, 48), weight.view(torch.int32), weight + 1e-6]
    assert len({tensor_digest(other) for other in (weight, *others)}) == 5
    assert tensor_digest(torch.zeros(0, 4)) != tensor_digest(torch.zeros(4, 0))


def test_key_depends_on_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell_key("kind", tensor="t", format="f")
    assert before == cell_key("kind", format="f", tensor="t")
    assert before != cell_key("kind", tensor="t", format="g")
    assert before != cell_key("other", tensor="t", format="f")
    monkeypatch.setattr(cache_module, "code_digest", lambda: "other code")
    assert before != cell_key("kind", tensor="t", format="f")


def test_digest_of_a_format_is_of_its_definition() -> None:
    """Every field counts, the name does not."""
    nf4 = get_format("nf4")
    renamed = dataclasses.replace(nf4, name="other")
    assert Variant("nf4", (), nf4).digest == Variant("other", (), renamed).digest
    table = Codebook("nf4", [*nf4.codebook.values[:15], 0.9])
    others = [
        nf4.override(block_size=32),
        nf4.override(double_quant=False),
        dataclasses.replace(nf4, encode_against="decoded"),
        dataclasses.replace(nf4, scale_block_size=128),
        Format("nf4", table),
    ]
    digests = {Variant("x", (), fmt).digest for fmt in (nf4, *others)}
    assert len(digests) == 1 + len(others)


DIE_AT_CELL = """
import os, signal
from qlora_kernels.lab import fidelity
real, seen = fidelity.measure, 0
def measure(weight, format):
    global seen
    seen += 1
    if seen == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(weight, format)
fidelity.measure = measure
"""


def test_killed_it_loses_one_cell_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it computes cell 6, the next run computes that one and those after it, and ends
    with the figures of one that was never killed."""
    monkeypatch.chdir(tmp_path)
    weights = str(write_weights(tmp_path / "w.safetensors"))
    options = ("fidelity", "--weights", weights, "--formats", "nf4", "int4", "--block-sizes", "32")
    killed = start(tmp_path, *options, prelude=DIE_AT_CELL.format(number=6))
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    with CellCache(tmp_path / "out" / "lab" / "cache") as cache:
        assert len(cache.cells) == 5
    assert lab(*options) == 0
    assert "3 cells computed" in capsys.readouterr().err  # of 4 tensors under 2 variants
    assert lab(*options, "--cache", "fresh", "--out", "whole") == 0
    assert "8 cells computed" in capsys.readouterr().err
    assert rows(tmp_path / "whole", "fidelity") == rows(tmp_path / "out/lab/fidelity", "fidelity")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with CellCache(tmp_path / "elsewhere") as cache:
        os.close(cache.handle)
        cache.handle = os.open("/dev/full", os.O_WRONLY)
        with pytest.raises(QLKError, match="cannot write"):
            cache.put("a", {"x": 1})
        assert cache.get("a") is None
