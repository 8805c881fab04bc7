"""The report's arithmetic, its table and its plots; a progress bar on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from qlora_kernels.finetune.plots import running_mean, write_plots
from qlora_kernels.finetune.report import (
    MethodReport,
    cells,
    document,
    markdown,
    text_table,
    with_gains,
)
from tests.finetune.running import QUICK_START, ROOT, Command


def method_report(method: str, before: float, after: float, **changes: Any) -> MethodReport:
    values: dict[str, Any] = {
        "method": method,
        "settings": {"method": method, "rank": 4, "lr": 0.1 if method == "full" else 0.2},
        "text": "digest",
        "train_losses": [3.0, 2.0, 1.0],
        "eval_loss_before": before,
        "eval_loss_after": after,
        "trainable_parameters": 1000,
        "total_parameters": 4000,
        "base_bytes": 16_000_000,
        "bits_per_parameter": 32.0,
        "quantized_bits_per_parameter": 4.127 if method == "qlora" else None,
        "peak_bytes": 123_456_789,
        "tokens_per_second": 4321.5,
    }
    return MethodReport(**{**values, **changes})


def comparison(full_after: float = 1.0) -> dict[str, Any]:
    """Full falls from 2 to ``full_after``, LoRA to 1.1; QLoRA from 2.5, its quantization's."""
    single = document(
        "",
        [
            method_report("full", 2.0, full_after),
            method_report("lora", 2.0, 1.1),
            method_report("qlora", 2.5, 1.2),
        ],
    )
    return document("compare", with_gains(single["methods"]))


def test_gain_is_measured_from_the_dense_model() -> None:
    """QLoRA fell by 1.3, of which 0.5 only undid its own quantization: 0.8 of full's 1.0."""
    gains = {name: m["gain_recovered"] for name, m in comparison()["methods"].items()}
    assert gains == pytest.approx({"full": 1.0, "lora": 0.9, "qlora": 0.8})


def test_no_gain_to_recover() -> None:
    content = comparison(full_after=2.1)
    assert all(m["gain_recovered"] is None for m in content["methods"].values())
    assert text_table(content).splitlines()[-1].split() == ["gain", "recovered", "-", "-", "-"]


def test_table() -> None:
    rows = {row[0].strip(): row[1:] for row in cells(comparison())}
    assert rows[""] == ["full", "lora", "qlora"]
    assert rows["trained parameters"] == ["1,000"] * 3
    assert rows["share of all"] == ["25.0 %"] * 3
    assert rows["base weights"] == ["16.0 MB"] * 3
    assert rows["where quantized"] == ["-", "-", "4.127"]
    assert rows["peak memory"] == ["123.5 MB"] * 3
    assert rows["tokens/s"] == ["4,322"] * 3 or rows["tokens/s"] == ["4,321"] * 3
    assert rows["held-out loss before"] == ["2.0000", "2.0000", "2.5000"]
    assert rows["gain recovered"] == ["100.0 %", "90.0 %", "80.0 %"]
    lines = text_table(comparison()).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) < 80


def test_single_run_has_no_gain_row() -> None:
    content = document("lora", [method_report("lora", 2.0, 1.0)])
    assert "gain recovered" not in text_table(content)
    assert "Gain recovered" not in markdown(content, [])


def test_markdown_has_the_table_the_plots_and_the_options() -> None:
    text = markdown(comparison(), ["loss.png"])
    assert "| gain recovered | 100.0 % | 90.0 % | 80.0 % |" in text
    assert "![loss](loss.png)" in text and "memory.png" not in text
    assert "- lr: 0.1 (full), 0.2 (lora), 0.2 (qlora)" in text
    assert "- rank: 4\n" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {5}


def test_running_mean_is_over_a_tenth() -> None:
    assert running_mean([1.0, 2.0, 6.0]) == [1.0, 2.0, 6.0]
    values = [float(n) for n in range(40)]
    assert running_mean(values)[:4] == [0.0, 0.5, 1.0, 1.5]
    assert running_mean(values)[-1] == sum(values[-4:]) / 4


def test_plots_are_images(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra")
    assert write_plots(tmp_path, comparison()) == ["loss.png", "memory.png"]
    for name in ("loss.png", "memory.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    # One step, one method, still a plot.
    alone = document("full", [method_report("full", 2.0, 1.0, train_losses=[1.5])])
    assert len(write_plots(tmp_path, alone)) == 2


def test_report_is_json_and_names_the_machine(command: Command) -> None:
    assert command.here("--method", "lora", "--steps", "1", "--out", "run") == 0
    report = json.loads((command.folder / "run" / "report.json").read_text())
    assert report["command"] == "lora"
    assert set(report["machine"]) >= {"cpu", "threads", "python", "torch"}
    assert report["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_terminal_gets_a_bar(command: Command) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_kernels", *command.arguments(["--method", "lora"])],
        cwd=command.folder,
        env={**os.environ, "PYTHONPATH": f"{QUICK_START}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # a terminal whose other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert re.search(rb"lora: 100%\|.*\| 6/6 \[.*step.*loss \d", shown)
    assert b"step 6 of 6" not in shown
    assert "held-out loss after" in out and "\r" not in out
