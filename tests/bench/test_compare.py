"""compare: a slow-down beyond noise is told, noise and a slower machine are not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import base, compare
from bench.compare import Change, Estimate, Measured
from qlora_kernels.errors import ArgumentError


def times(median: float, spread: float = 0.04, rounds: int = 30) -> dict[str, Any]:
    return {"median": median, "minimum": median, "spread": spread, "rounds": rounds}


def record(ours: float, peer: float | None = None, *, spread: float = 0.04) -> dict[str, Any]:
    peers = {"torch": times(peer, spread)} if peer else {"torch": {"missing": "not installed"}}
    return {"points": [{"key": "a/b", "ours_ms": times(ours, spread), "peers_ms": peers}]}


def verdict(before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> Change:
    sides = []
    for name, content in (("before", before), ("after", after)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        sides.append(compare.read_records(path)[0])
    (found,) = compare.compare(*sides)
    return found


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (record(1.0), record(1.2), "slower"),
        (record(1.0), record(0.8), "faster"),
        (record(1.0), record(1.04), "same"),  # below what counts at all
        (record(1.0, spread=0.5), record(1.2, spread=0.5), "same"),  # within its scatter
        (record(1.0, 2.0), record(1.3, 2.6), "same"),  # the machine is slower
        (record(1.0, 2.0), record(1.0, 1.4), "slower"),  # it is faster, and ours did not follow
        (record(1.0, spread=float("nan")), record(1.3, spread=float("nan")), "same"),
    ],
)
def test_verdicts(before: dict, after: dict, expected: str, tmp_path: Path) -> None:
    assert verdict(before, after, tmp_path).verdict == expected


def test_noise_is_the_standard_error_of_a_median() -> None:
    # sigma = IQR / 1.349; a median's error is sqrt(pi/2) of a mean's; 9 rounds count at most.
    assert Estimate.of(times(5.0, 0.1349, 9)).error == pytest.approx(0.1 * 1.2533 / 3)
    assert Estimate.of(times(5.0, 0.1349, 900)).error == pytest.approx(0.1 * 1.2533 / 3)
    pooled = Estimate.pooled([Estimate(1.0, 0.01), Estimate(1.2, 0.01)])
    assert pooled.median == 1.1 and pooled.error == pytest.approx(0.1 / 1.1)
    assert Estimate.pooled([Estimate(1.0, 0.02)]) == Estimate(1.0, 0.02)


def test_our_own_rows_are_no_measure_of_the_machine() -> None:
    measured: dict[str, Measured] = {}
    row = {"work": "w", "peer": "our LoRALinear", "ours_ms": times(1), "peer_ms": times(2)}
    compare._collect({"rows": [row, {**row, "peer": "torch"}]}, measured)
    assert measured["w / our LoRALinear"].peers == {}
    assert set(measured["w / torch"].peers) == {"torch"}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("a", record(1.0)), ("b", record(1.5)), ("c", {"points": []})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "grid.json").write_text(json.dumps(content))
    paths = {name: str(tmp_path / name) for name in "abc"}
    assert compare.main([paths["a"], paths["b"]]) == 1
    assert "1 slower" in capsys.readouterr().out
    assert compare.main([paths["b"], paths["a"]]) == 0
    assert compare.main([paths["a"], paths["b"], "--least", "0.6"]) == 0
    assert compare.main([paths["a"], paths["c"]]) == 2
    assert "one of bench.run" in capsys.readouterr().err
    wrong = {"points": [], "refused": [{"key": "a/b", "reason": "off"}]}
    (tmp_path / "c" / "grid.json").write_text(json.dumps(wrong))
    assert compare.main([paths["a"], paths["c"]]) == 1
    assert "WRONG after: a/b" in capsys.readouterr().out


def test_base_command_line() -> None:
    given = ["--base", "HEAD", "--only", "dropout", "--repeats=3", "--out", "x", "--strict"]
    assert base.without_base(given) == ["--only", "dropout"]


def test_base_measures_another_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commits of a stand-in project, the second half as fast."""
    root = tmp_path / "project"
    (root / "bench").mkdir(parents=True)
    (root / "qlora_kernels" / "testing").mkdir(parents=True)
    (root / "qlora_kernels" / "libqlora_kernels.so").touch()
    (root / "bench" / "run.py").write_text(
        "import json, pathlib, sys\n"
        "ms = float(pathlib.Path('speed.txt').read_text())\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir(parents=True)\n"
        f"record = {record(1.0)!r}\n"
        "record['points'][0]['ours_ms']['median'] = ms\n"
        "(out / 'grid.json').write_text(json.dumps(record))\n"
    )

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    for speed in ("1.0", "2.0"):
        (root / "speed.txt").write_text(speed)
        git("add", ".")
        git("commit", "-q", "-m", speed)
    monkeypatch.setattr(base, "ROOT", root)
    from bench.run import build_parser

    given = ["--base", "HEAD~1", "--shape", "tiny"]
    assert base.main(given, build_parser().parse_args(given)) == 1
    assert "1 slower" in capsys.readouterr().out
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=root, capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == 1
    given[1] = "nothing"
    with pytest.raises(ArgumentError, match="base must be a commit"):
        base.main(given, build_parser().parse_args(given))
