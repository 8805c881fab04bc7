"""The report: what the records say, on one page that a browser shows without a network."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="in the bench extra")

from bench import figures, report
from bench.grid.points import Point

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
ROOT = Path(__file__).resolve().parents[2]


def times(median: float) -> dict[str, Any]:
    return {"median": median, "minimum": median, "spread": 0.05, "rounds": 30, "how": "wall clock"}


def grid_point(op: str, tokens: int, ms: float) -> dict[str, Any]:
    point = Point(op, "cpu:avx2", "nf4", "bf16", "small", 1024, 1024, tokens)
    peers: dict[str, Any] = {
        "torch bf16 linear": {**times(2 * ms), "speedup": 2.0},
        "torchao <linear>": {"missing": "torchao & friends are not installed"},
    }
    flops = 2 * tokens * 1024 * 1024
    shared = {"nbytes": 600_000, "flops": flops, "floor_ms": ms / 2, "share": 0.5}
    return {**point.record(), "ours_ms": times(ms), "peers_ms": peers, **shared}


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """One of everything that can be shown."""
    machine = {
        "cpu": "A CPU",
        "cores": 2,
        "isa": "avx2",
        "threads": 2,
        "versions": {"torch": "2.13.0", "peft": None},
        "commit": "0123456789ab",
        "date": "2026-01-01T00:00:00+00:00",
    }
    row = {"work": "forward M = 1", "peer": "torch", "ours_ms": times(1), "peer_ms": times(3)}
    verdict = {"ratio": 0.3333, "at_most": None, "times_faster": 4.0, "passed": False, "note": ""}
    held = {"work": "saved bytes", "peer": "PEFT", "ours_bytes": 1 << 20, "peer_bytes": 3 << 20}
    held |= {"ratio": 0.3333, "at_most": 0.5, "times_faster": None, "passed": True, "note": ""}
    grid = {
        "machine": machine,
        "ceilings": {
            "copy_bytes_per_second": 1e10,
            "read_bytes_per_second": 1e10,
            "gemm_flops_per_second": {"bf16": 1e11, "fp32": 5e10},
        },
        "points": [grid_point("quantized_matmul", m, 0.3 + m / 50) for m in (1, 16, 256)]
        + [grid_point("dequantize", 0, 0.4)],
        "skipped": [{"backend": "triton", "reason": "torch sees no CUDA device"}],
        "refused": [{"key": "dropout/bad", "reason": "3 of 9 elements differ"}],
    }
    speed = {"tokens_per_second": 1234.5, "peak_bytes": 3 << 30}
    planned = {"total": 41 << 30}
    stages = {
        "training": {"QLoRA, ours": speed, "LoRA bf16, PEFT": {"missing": "peft"}},
        "sixty_five": {"llama-65b in 48 GiB": {**speed, "planned_bytes": planned}},
        "decode": {"QLoRA, ours": {"1": speed, "2": {"refused": "NaN"}}},
    }
    folder = tmp_path / "records"
    folder.mkdir()
    files: dict[str, Any] = {
        "targets": {"machine": machine, "rows": [{**row, **verdict}, held]},
        "grid": grid,
    }
    for name, rows in stages.items():
        ended = {"stage": name, "status": "done", "seconds": 5.0, "error": None}
        files[name] = {**ended, "content": {"rows": rows}}
    # A stage whose content has its own meaning for a name of the grid's.
    ended = {"stage": "tests", "status": "failed", "seconds": 5.0, "error": "pytest ended with 1"}
    files["tests"] = {**ended, "content": {"passed": 9, "skipped": 2, "failures": {}}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_page_holds_everything_and_fetches_nothing(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert report.main([str(records), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    for text in (
        "A CPU, avx2, 2 threads, commit 0123456789ab",
        "torch 2.13.0",
        "quantized_matmul/cpu:avx2/nf4/bf16/N1024-K1024-M16",
        "torchao &lt;linear&gt;: torchao &amp; friends are not installed",
        "triton: torch sees no CUDA device",
        "3 of 9 elements differ",
        ">MISS<",
        "4x faster",
        "3.00 MiB",
        "pytest ended with 1",
    ):
        assert text in page, text
    # Links and sources are fragments of the page; http is in names of XML vocabularies only.
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "@import" not in page and "<script" not in page
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert {"Roofline", "Speed against peers", "Memory: saved bytes", "Decoding"} <= set(headings)
    names = {path.stem for path in out.glob("*.png")}
    assert {"speedups", "roofline-1", "bandwidth", "crossover-1", "training", "decode"} <= names
    assert {"memory-1", "memory-2", "memory-3"} <= names
    assert page.count("<svg") == len(names)


def test_recorded_results_can_be_shown(tmp_path: Path) -> None:
    """The records of this project's own machines, whatever there is."""
    materials = report.read([report.RESULTS])
    assert any(material.rows and material.machines for material in materials)
    for material in materials:
        for _, _, _, figure in report.figures_of(material):
            figure.suptitle(material.machine, fontsize=9)
            assert_readable(figure)


def test_machines_share_no_chart(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages belong to the machine of their folder, and a figure bears its machine's name."""
    titles = []

    def picture(figure: Any, kind: str) -> bytes:
        titles.append(figure.get_suptitle())
        return b"<svg></svg>"

    monkeypatch.setattr(figures, "picture", picture)
    other = shutil.copytree(records, tmp_path / "other")
    for path in other.glob("*.json"):
        path.write_text(path.read_text().replace('"isa": "avx2"', '"isa": "avx512"'))
    one, two = report.read([records, other])
    assert (one.machine, two.machine) == ("A CPU, avx2, 2 threads", "A CPU, avx512, 2 threads")
    for material in (one, two):
        assert (len(material.rows), len(material.points), len(material.runs)) == (2, 4, 1)
        assert set(material.stages) == {"training", "sixty_five", "decode", "tests"}
    out = tmp_path / "out"
    paths = report.write([one, two], out)
    stems = {stem for stem, _, _, _ in report.figures_of(one)}
    assert {p.stem for p in paths[1:]} == stems | {f"machine-2-{stem}" for stem in stems}
    assert titles == [one.machine] * 2 * len(stems) + [two.machine] * 2 * len(stems)
    page = (out / "report.html").read_text()
    first, second = (page.index(f"<h1>{m.machine}</h1>") for m in (one, two))
    assert first < second
    for heading in ("Roofline", "Speed against peers", "Decoding", "Targets", "All points"):
        assert page.count(f"<h2>{heading}</h2>") == 2
        assert first < page.index(f"<h2>{heading}</h2>") < second
    # A folder that does not say what it is of has its own name.
    (other / "grid.json").unlink()
    (other / "targets.json").unlink()
    assert [m.machine for m in report.read([records, other])] == [one.machine, "other"]


def assert_readable(figure: Any) -> None:
    """No text leaves the figure, and no tick's label lies on another."""
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [
                label.get_window_extent()
                for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                if label.get_text() and low <= tick <= high
            ]
            for box in shown:
                assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1
            for one, other in itertools.pairwise(shown):
                apart = one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1
                assert apart or one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1
        for text in axes.texts:
            box = text.get_window_extent()
            assert box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()


def test_figures_are_readable(records: Path) -> None:
    (material,) = report.read([records])
    drawn = {stem: f for stem, _, _, f in report.figures_of(material)}
    for figure in drawn.values():
        assert_readable(figure)
    (axes,) = drawn["roofline-1"].axes
    marks = [line for line in axes.lines if line.get_label() == "quantized_matmul"]
    assert len(marks) == 1 and len(marks[0].get_xdata()) == 3
    assert marks[0].get_ydata()[0] == pytest.approx(2 * 1024 * 1024 / 0.32e-3 / 1e9)
    long_labels = [(f"{'a long name ' * 5} {i}", 10.0**i) for i in range(12)]
    assert_readable(figures.bars(long_labels, "ms", "lower", None))


def test_units() -> None:
    assert figures.nice_bytes(100)[1] == "B"
    factor, unit = figures.nice_bytes(3 << 30)
    assert (3 << 30) * factor == 3 and unit == "GiB"
    assert [figures.plain(value) for value in (0.05, 1.0, 20.0, 5000.0)] == [
        "0.05",
        "1",
        "20",
        "5,000",
    ]


def test_nothing_to_show_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "record must be one of bench.run" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("{")
    assert report.main([str(tmp_path)]) == 2
    assert report.main([str(tmp_path / "none.json")]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(records: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    out = tmp_path / "out"
    report.write(report.read([records]), out)
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    # Nothing resolves: what the page would fetch could not be shown.
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
    command += ["--window-size=1000,1400", f"--screenshot={shot}"]
    page = (out / "report.html").as_uri()
    done = subprocess.run([*command, page], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and shot.exists(), done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (1400, 1000)
    missed = [int(figures.MISSED[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    bar = abs(pixels - missed).max(axis=-1) < 0.02
    ink = pixels.min(axis=-1) < 0.5
    # The bar of the missed target and the text are on the first screen; most of it is paper.
    assert bar.sum() > 500 and 0.005 < ink.mean() < 0.5
