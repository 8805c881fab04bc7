"""`bench report RECORD … --out DIR`: one page that needs nothing else, and its plots as files.

RECORD is a record of `bench.run`, a stage of `bench.on_gpu`, or a folder of them. The page is
DIR/report.html: plots are inside it, nothing is fetched from anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.page import page
from bench.records import RESULTS
from qlora_kernels.errors import QLKError, argument_error
from qlora_kernels.files import write_atomically, write_text

CURVES_AT_LEAST, MOST_CROSSOVERS = 3, 12


@dataclass
class Material:
    """What the records of one machine hold, by what it is shown as.

    Attributes:
        machine: its name, which every figure bears: times of two machines share no chart.
        machines: what it is, by its name and commit.
        runs: points with their run's ceilings.
    """

    machine: str
    machines: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    runs: list[tuple[list[dict[str, Any]], Mapping[str, Any]]] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def shows(self) -> bool:
        """Whether there is anything in it beside the machine."""
        return bool(self.rows or self.points or self.stages or self.refused)


def read(paths: Sequence[Path]) -> list[Material]:
    """Everything in records and folders of them, machine by machine.

    Raises:
        ArgumentError: no such file, or nothing in it that can be shown.
    """
    records: list[tuple[Path, Mapping[str, Any]]] = []
    for path in paths:
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
                raise argument_error(
                    "report", "record", "readable JSON", f"{file}: {error}"
                ) from error
            if isinstance(content, dict):
                records.append((file, content))
    # The stages of a GPU run are in a folder, and one of them says what the machine is.
    in_folder: dict[Path, set[str]] = {}
    for file, content in records:
        if (machine := _machine_in(content)) is not None:
            in_folder.setdefault(file.parent, set()).add(machine_name(machine))
    found: dict[str, Material] = {}
    for file, content in records:
        machine, beside = _machine_in(content), in_folder.get(file.parent, set())
        if machine is not None:
            name = machine_name(machine)
        else:
            name = next(iter(beside)) if len(beside) == 1 else file.resolve().parent.name
        _take(content, found.setdefault(name, Material(name)))
    shown = [material for material in found.values() if material.shows]
    if not shown:
        names = ", ".join(map(str, paths))
        raise argument_error("report", "record", "one of bench.run or bench.on_gpu", names)
    return shown


def machine_name(machine: Mapping[str, Any]) -> str:
    """A GPU's name; a CPU's with the instruction set, which its name does not tell, and threads."""
    gpu = (machine.get("gpu") or {}).get("name")
    return gpu or f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads"


def _machine_in(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    inner = content.get("content", {}) if "stage" in content else content
    machine = inner.get("machine")
    return machine if isinstance(machine, dict) else None


def _take(content: Mapping[str, Any], material: Material) -> None:
    if (machine := _machine_in(content)) is not None:
        material.machines[f"{material.machine}, commit {machine['commit']}"] = machine
    if "stage" in content:
        material.stages[content["stage"]] = dict(content)
        content = content["content"]
    for name in ("rows", "points", "skipped", "refused"):
        # Stages have figures of their own under some of these names.
        if isinstance(content.get(name), list):
            getattr(material, name).extend(content[name])
    if "ceilings" in content:
        material.runs.append((content["points"], content["ceilings"]))


def figures_of(material: Material) -> Iterator[tuple[str, str, str, Any]]:
    """(file stem, heading, caption, figure) of everything there is to draw."""
    from bench import figures

    timed = [row for row in material.rows if "ours_ms" in row]
    if timed:
        yield (
            "speedups",
            "Speed against peers",
            "A bar is the median over rounds in which the two took turns. The black tick is what "
            "must be reached, where there is such a target.",
            figures.speed_ups(
                [
                    {
                        "label": f"{row['work']}\nvs {row['peer']}",
                        "speedup": 1 / row["ratio"],
                        "target": row["times_faster"]
                        or (1 / row["at_most"] if row["at_most"] else None),
                    }
                    for row in timed
                ]
            ),
        )
    for number, (points, ceilings) in enumerate(material.runs):
        computing = [p | {"seconds": p["ours_ms"]["median"] / 1e3} for p in points if p["flops"]]
        if computing:
            yield (
                f"roofline-{number + 1}",
                "Roofline",
                "Each mark is one product of one size. It cannot lie above the line: on the slope "
                "it waits for memory, on the level for arithmetic. The lines are of the same run.",
                figures.roofline(
                    computing,
                    ceilings["copy_bytes_per_second"],
                    ceilings["gemm_flops_per_second"],
                ),
            )
    moving = [p for p in material.points if not p["flops"]]
    if moving:
        yield (
            "bandwidth",
            "Memory-bound ops",
            "Share of the rate at which torch copies, measured in the same run: 100 % is a copy.",
            figures.bars(
                [(f"{p['key']} (ours)", 100 * p["share"]) for p in moving],
                "% of the copy's bytes per second",
                "higher",
                None,
            ),
        )
    for number, (title, curves) in enumerate(crossovers(material.points)):
        yield (
            f"crossover-{number + 1}",
            "Over the number of tokens" if number == 0 else "",
            "Time of one call. Where two curves cross, the faster choice changes.",
            figures.crossover(title, curves),
        )
    yield from memory_figures(material)
    yield from rate_figures(material)


def crossovers(
    points: Sequence[Mapping[str, Any]],
) -> list[tuple[str, dict[str, dict[int, float]]]]:
    """(title, curve's name -> tokens -> ms) of every problem measured at three sizes or more."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for point in points:
        if not point["M"]:
            continue
        rank = f", rank {point['R']}" if point["R"] else ""
        title = (
            f"{point['op']}, {point['layer']} [{point['N']} x {point['K']}], "
            f"{point['format']}, {point['dtype']}{rank}"
        )
        curves = found.setdefault(title, {})
        ours = curves.setdefault(f"ours, {point['backend']}", {})
        ours[point["M"]] = point["ours_ms"]["median"]
        for name, peer in point["peers_ms"].items():
            if "missing" not in peer:
                curves.setdefault(name, {}).setdefault(point["M"], peer["median"])
    kept = [
        (title, curves)
        for title, curves in found.items()
        if len({m for times in curves.values() for m in times}) >= CURVES_AT_LEAST
    ]
    return kept[:MOST_CROSSOVERS]


def memory_figures(material: Material) -> Iterator[tuple[str, str, str, Any]]:
    """Bars of bytes: the cases' rows, training steps, the large models beside their plan."""
    from bench import figures

    by_work: dict[str, list[tuple[str, float]]] = {}
    for row in material.rows:
        if "ours_bytes" in row:
            bars = by_work.setdefault(row["work"], [("ours", row["ours_bytes"])])
            bars.append((row["peer"], row["peer_bytes"]))
    peaks: dict[str, list[tuple[str, float]]] = {}
    plans: dict[str, dict[str, float]] = {}
    for name, figure in _stage_rows(material, "training"):
        if "peak_bytes" in figure:
            peaks.setdefault("Peak of a training step", []).append((name, figure["peak_bytes"]))
    for name, figure in _stage_rows(material, "sixty_five"):
        if "peak_bytes" in figure:
            label = f"{name} (ours)"
            peaks.setdefault("Peak of large models", []).append((label, figure["peak_bytes"]))
            planned = plans.setdefault("Peak of large models", {})
            planned[label] = figure["planned_bytes"]["total"]
    for number, (title, rows) in enumerate([*by_work.items(), *peaks.items()]):
        factor, unit = figures.nice_bytes(max(size for _, size in rows))
        scaled = [(name, size * factor) for name, size in rows]
        marks = {name: size * factor for name, size in plans.get(title, {}).items()}
        drawn = figures.bars(scaled, unit, "lower", marks or None)
        yield f"memory-{number + 1}", f"Memory: {title}", "", drawn


def rate_figures(material: Material) -> Iterator[tuple[str, str, str, Any]]:
    """Bars of tokens a second: training steps, decoding."""
    from bench import figures

    training = [
        (name, figure["tokens_per_second"])
        for name, figure in _stage_rows(material, "training")
        if "tokens_per_second" in figure
    ]
    decoding = [
        (f"{name}, batch {batch}", figure["tokens_per_second"])
        for name, batches in _stage_rows(material, "decode")
        for batch, figure in batches.items()
        if isinstance(figure, dict) and "tokens_per_second" in figure
    ]
    for stem, title, rows in (
        ("training", "A training step", training),
        ("decode", "Decoding", decoding),
    ):
        if rows:
            drawn = figures.bars(rows, "tokens per second", "higher", None)
            yield stem, title, "", drawn


def _stage_rows(material: Material, stage: str) -> list[tuple[str, dict[str, Any]]]:
    content = material.stages.get(stage, {}).get("content", {})
    return list(content.get("rows", {}).items())


def write(materials: Sequence[Material], out: Path) -> list[Path]:
    """The page and the plots as PNG files; returns their paths.

    Raises:
        ArgumentError: matplotlib is missing.
    """
    try:
        from bench import figures
    except ModuleNotFoundError as error:
        raise argument_error(
            "report", "matplotlib", "installed (pip install 'qlora_kernels[plot]')", error
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    paths, drawn = [], []
    for number, material in enumerate(materials):
        pictures = []
        for stem, heading, caption, figure in figures_of(material):
            figure.suptitle(material.machine, fontsize=9)
            pictures.append((heading, caption, figures.picture(figure, "svg")))
            path = out / (f"{stem}.png" if number == 0 else f"machine-{number + 1}-{stem}.png")
            write_atomically(path, [figures.picture(figure, "png")])
            paths.append(path)
        drawn.append(pictures)
    path = out / "report.html"
    write_text(path, page(materials, drawn))
    return [path, *paths]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="bench report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", nargs="*", type=Path, default=[RESULTS])
    parser.add_argument("--out", type=Path, default=Path("bench-report"))
    options = parser.parse_args(arguments)
    try:
        for path in write(read(options.records), options.out):
            print(path)
    except QLKError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
