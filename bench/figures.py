"""The report's figures, each from plain figures of records; drawn with matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

# Okabe and Ito's palette, told apart by colour-blind eyes; ours is always the first.
OURS_COLOUR = "#0072B2"
# Of several curves of ours, one a backend.
OURS_SHADES = (OURS_COLOUR, "#56B4E9", "#00344F", "#7A9CC6", "#3A5FCD")
PEER_COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#000000", "#999999", "#B3A100")
MARKERS = ("s", "^", "D", "v", "P", "X", "*")
MISSED, GRID_LINE = "#D55E00", {"alpha": 0.25, "linewidth": 0.7}
WIDTH = 9.0


def plain(value: float) -> str:
    """A number for an axis: 0.05, 1, 20, 5,000."""
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


class PlainFormatter(LogFormatter):
    """Numbers instead of powers of ten, where a logarithmic axis has room for them."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return plain(value) if super().__call__(value, position) else ""


def plain_axis(axis: Any) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_major_formatter(PlainFormatter())
    axis.set_minor_formatter(PlainFormatter(minor_thresholds=(1, 0.4)))
    axis.set_tick_params(which="minor", labelsize=8)


def speed_ups(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How many times as fast ours is as each peer: a bar a row, its target as a tick."""
    height = 0.36 * len(rows) + 1.4
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        missed = row["target"] is not None and row["speedup"] < row["target"]
        colour = MISSED if missed else OURS_COLOUR
        axes.barh(i, row["speedup"] - 1, left=1, height=0.66, color=colour)
        # Beside whatever reaches furthest: the bar, the line at 1, the tick.
        end = max(row["speedup"], 1.0, row["target"] or 0.0)
        axes.annotate(f"  {row['speedup']:.2f}x", (end, i), va="center", fontsize=8)
        if row["target"] is not None:
            axes.plot([row["target"]] * 2, [i - 0.42, i + 0.42], color="black", linewidth=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axes.set_xscale("log")
    plain_axis(axes.xaxis)
    shown = [row["speedup"] for row in rows] + [row["target"] for row in rows if row["target"]]
    axes.set_xlim(min([*shown, 1.0]) / 1.3, max([*shown, 1.0]) * 2.2)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("times as fast as the peer (right of 1: ours is faster; logarithmic)")
    axes.plot([], [], color="black", linewidth=2, label="must reach")
    axes.bar(0, 0, color=OURS_COLOUR, label="ours")
    axes.bar(0, 0, color=MISSED, label="target missed")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="x", which="both", **GRID_LINE)
    return figure


def roofline(points: Sequence[Mapping[str, Any]], copy: float, gemm: Mapping[str, float]) -> Figure:
    """GFLOP/s of each product over its FLOPs a byte, under the measured ceilings.

    Args:
        points: with op, dtype, flops, nbytes and seconds.
        copy: bytes a second; gemm: FLOPs a second by dtype.
    """
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.add_subplot()
    intensities = [p["flops"] / p["nbytes"] for p in points]
    low, high = min(intensities) / 3, max(max(intensities), max(gemm.values()) / copy) * 3
    span = [low * (high / low) ** (i / 200) for i in range(201)]
    used = [name for name in gemm if any(p["dtype"] == name for p in points)]
    for i, name in enumerate(used):
        roof = [min(copy * x, gemm[name]) / 1e9 for x in span]
        axes.plot(span, roof, color="black", linestyle=("-", "--", ":")[i % 3], linewidth=1.2)
        axes.annotate(
            f"{name} GEMM, {plain(gemm[name] / 1e9)} GFLOP/s",
            (span[-1], gemm[name] / 1e9),
            xytext=(-6, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    rates = [p["flops"] / p["seconds"] / 1e9 for p in points]
    axes.set_ylim(min(rates) / 2, max(gemm[name] for name in used) / 1e9 * 2.2)
    axes.set_xlim(low, high)
    for i, op in enumerate(sorted({p["op"] for p in points})):
        chosen = [p for p in points if p["op"] == op]
        axes.plot(
            [p["flops"] / p["nbytes"] for p in chosen],
            [p["flops"] / p["seconds"] / 1e9 for p in chosen],
            MARKERS[i % len(MARKERS)],
            color=(OURS_COLOUR, *PEER_COLOURS)[i % 8],
            markersize=7,
            alpha=0.8,
            label=op,
        )
    axes.plot([], [], color="black", label=f"copy, {plain(round(copy / 1e9, 1))} GB/s, then GEMM")
    axes.set_xlabel("FLOPs per byte that must be moved (logarithmic)")
    axes.set_ylabel("GFLOP/s (logarithmic)")
    plain_axis(axes.xaxis)
    plain_axis(axes.yaxis)
    axes.grid(which="major", **GRID_LINE)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def crossover(title: str, curves: Mapping[str, Mapping[int, float]]) -> Figure:
    """Milliseconds over the number of tokens, a curve a competitor; `ours …` stand out."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.add_subplot()
    kinds = {ours: [n for n in curves if n.startswith("ours") == ours] for ours in (True, False)}
    for name, times in curves.items():
        ours = name.startswith("ours")
        order = sorted(times)
        number = kinds[ours].index(name)
        axes.plot(
            order,
            [times[tokens] for tokens in order],
            marker="o" if ours else MARKERS[number % len(MARKERS)],
            color=(OURS_SHADES if ours else PEER_COLOURS)[number % 5],
            linewidth=2.2 if ours else 1.3,
            linestyle="-" if ours else "--",
            markersize=6,
            label=name,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_axis(axes.xaxis)
    plain_axis(axes.yaxis)
    axes.set_xticks(sorted({tokens for times in curves.values() for tokens in times}))
    axes.set_xlabel("tokens M (logarithmic)")
    axes.set_ylabel("ms (logarithmic)")
    axes.set_title(title, fontsize=10)
    axes.grid(which="major", **GRID_LINE)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def bars(
    rows: Sequence[tuple[str, float]], unit: str, better: str, marks: Mapping[str, float] | None
) -> Figure:
    """Horizontal bars of one quantity; ours in its colour.

    Args:
        rows: (label, value) from the top.
        unit: of the values, for the axis.
        better: "lower" or "higher".
        marks: label -> a value to mark on its bar, e.g. a prediction.
    """
    figure = Figure(figsize=(WIDTH, 0.4 * len(rows) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, value) in enumerate(rows):
        colour = OURS_COLOUR if "ours" in label or "accelerated" in label else "#999999"
        axes.barh(i, value, height=0.66, color=colour)
        axes.annotate(
            f" {value:,.3g}" if value < 1000 else f" {value:,.0f}",
            (value, i),
            va="center",
            fontsize=8,
        )
        if marks and label in marks:
            axes.plot([marks[label]] * 2, [i - 0.42, i + 0.42], color="black", linewidth=2)
    if marks:
        axes.plot([], [], color="black", linewidth=2, label="planned")
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    largest = max([value for _, value in rows] + list((marks or {}).values()))
    axes.set_xlim(0, largest * 1.15 if largest else 1)
    axes.set_xlabel(f"{unit} ({better} is better)")
    axes.set_axisbelow(True)
    axes.grid(axis="x", **GRID_LINE)
    return figure


def picture(figure: Figure, kind: str) -> bytes:
    """The file of a figure, "svg" or "png"."""
    out = io.BytesIO()
    # No date: the same figures make the same file.
    options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 130}
    figure.savefig(out, format=kind, **options)
    return out.getvalue()


def nice_bytes(size: float) -> tuple[float, str]:
    """(factor, unit) to show sizes up to `size` in."""
    power = min(4, max(0, int(math.log(max(size, 1), 1024))))
    return 1024.0**-power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
