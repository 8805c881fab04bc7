"""`info` tells what runs here and why the rest does not; the README shows the same matrix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kernels import info
from qlora_kernels.backends import library
from qlora_kernels.backends.registry import OPS, entries

ROOT = Path(__file__).resolve().parents[1]


def run_info(tmp_path: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kernels", "info"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_readme_shows_the_support_matrix() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, begin, rest = readme.partition("<!-- support matrix -->\n")
    shown, end, _ = rest.partition("<!-- end of support matrix -->")
    assert begin and end, "README.md has no support matrix between its two comments"
    assert shown.strip() == info.render_markdown().strip()


def test_info_has_a_cell_for_every_entry() -> None:
    lines = info.render().splitlines()
    header = next(line for line in lines if line.startswith("op ")).split()
    for op in OPS:
        row = next(line.split() for line in lines if line.split()[:1] == [op])
        cells = dict(zip(header, row, strict=True))
        expected = {entry.backend: "no" if entry.available() else "yes" for entry in entries(op)}
        assert {name: cell for name, cell in cells.items() if cell in ("yes", "no")} == expected


def test_info_gives_the_reason_for_every_missing_backend() -> None:
    text = info.render()
    for op in OPS:
        for entry in entries(op):
            reason = entry.available()
            assert reason is None or f"{entry.backend}: {reason}" in text


def test_info_without_the_library_says_why(tmp_path: Path) -> None:
    absent = tmp_path / "absent.so"
    text = run_info(tmp_path, QLK_LIBRARY=str(absent))
    assert f"native library: missing: QLK_LIBRARY names no file: {absent}" in text
    row = next(line for line in text.splitlines() if line.startswith("dequantize "))
    # The last backend, "dense", is one of products.
    assert row.split()[1:] == ["yes"] + ["no"] * (len(row.split()) - 3) + ["-"]


def test_info_with_a_foreign_library_says_why(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"not a library")
    text = run_info(tmp_path, QLK_LIBRARY=str(foreign))
    assert "native library: missing: foreign.so does not load" in text


@pytest.mark.skipif(library.load().missing is not None, reason="no native library")
def test_info_names_the_compiler() -> None:
    assert library.load().build["compiler"] in info.render()
