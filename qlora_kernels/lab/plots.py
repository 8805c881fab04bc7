"""PNG plots of the lab's tables. They need matplotlib, which stays optional (the `plot` extra)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_kernels.lab.console import say

# Okabe and Ito's palette, told apart by colour-blind eyes; lines beyond it repeat with dashes.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX"


def draw(name: str, fill: Callable[[Any], None], height: float = 4.8) -> dict[str, bytes]:
    """``name`` -> a PNG that ``fill`` drew on axes; empty without matplotlib, which is said."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is missing (pip install 'qlora_kernels[plot]')")
        return {}
    figure = Figure(figsize=(8.0, height), layout="constrained")
    fill(figure.add_subplot())
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return {name: png.getvalue()}


def style(number: int) -> dict[str, str]:
    """Colour and dash of the line of that number."""
    turn, index = divmod(number, len(COLOURS))
    return {"color": COLOURS[index], "linestyle": DASHES[turn % len(DASHES)]}


def errors_over_bits(
    points: Mapping[str, Sequence[tuple[float, float]]],
) -> Callable[[Any], None]:
    """A line a format: NMSE in dB over bits a weight."""

    def fill(axes: Any) -> None:
        for number, (name, values) in enumerate(points.items()):
            ordered = sorted(values)
            axes.plot(
                *zip(*ordered, strict=True), marker="o", markersize=4, label=name, **style(number)
            )
        axes.set(xlabel="bits per parameter", ylabel="NMSE, dB (lower is better)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small", ncols=2)

    return fill


def pareto(
    points: Mapping[str, Sequence[tuple[float, float]]],
    front: Sequence[tuple[float, float, str]],
    budgets: Sequence[float],
    title: str,
) -> Callable[[Any], None]:
    """Every variant as a point, coloured by format, and a step line along the best of each size."""

    def fill(axes: Any) -> None:
        for number, (name, values) in enumerate(points.items()):
            colour = COLOURS[number % len(COLOURS)]
            marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
            bits, errors = zip(*values, strict=True)
            axes.plot(bits, errors, marker, color=colour, markersize=4, alpha=0.55, label=name)
        steps = [point[:2] for point in front]
        axes.step(*zip(*steps, strict=True), where="post", color="black", linewidth=1.2)
        axes.margins(x=0.15)
        for at, error, label in spaced(front):
            axes.annotate(
                label, (at, error), xytext=(3, -9), textcoords="offset points", fontsize=6
            )
        for budget in budgets:
            axes.axvline(budget, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="bits per parameter", ylabel="NMSE, dB (lower is better)", title=title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="x-small", ncols=2)

    return fill


def spaced(front: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The points of a front that have room for a label; of neighbours the lowest."""
    room = (front[0][1] - front[-1][1]) / 40
    kept: list[tuple[float, float, str]] = []
    for point in reversed(front):
        if not kept or point[1] - kept[-1][1] > room:
            kept.append(point)
    return kept


def losses(curves: Mapping[str, Mapping[str, Any]]) -> Callable[[Any], None]:
    """Training losses as running means, and held-out losses at both ends, a colour a format."""
    from qlora_kernels.finetune.plots import running_mean

    def fill(axes: Any) -> None:
        for number, (name, values) in enumerate(curves.items()):
            train = values["train_losses"]
            steps = range(1, len(train) + 1)
            axes.plot(steps, running_mean(train), linewidth=1.5, label=name, **style(number))
            ends = [values["eval_loss_before"], values["eval_loss_after"]]
            axes.plot([0, len(train)], ends, "o", color=style(number)["color"], markersize=5)
        axes.plot([], [], "o", color="grey", label="held-out, before and after")
        axes.set(xlabel="step", ylabel="loss, nats per token")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")

    return fill


def bars(labels: Sequence[str], values: Sequence[float], axis: str) -> Callable[[Any], None]:
    """Horizontal bars from 0, the first at the top."""

    def fill(axes: Any) -> None:
        places = range(len(labels))
        axes.barh(places, values, color=COLOURS[0])
        axes.set_yticks(places, labels, fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel=axis)
        axes.grid(alpha=0.25, axis="x")

    return fill


def layer_errors(
    errors: Mapping[str, Mapping[str, float]], picked: Mapping[str, str], axis: str
) -> Callable[[Any], None]:
    """A row a layer, a point a variant on a logarithmic axis, a ring around the assigned one."""

    def fill(axes: Any) -> None:
        labels = list(dict.fromkeys(label for values in errors.values() for label in values))
        for number, label in enumerate(labels):
            marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
            colour = COLOURS[number % len(COLOURS)]
            found = [(values[label], row) for row, values in enumerate(errors.values())]
            axes.plot(*zip(*found, strict=True), marker, color=colour, markersize=4, label=label)
        rings = [(values[picked[layer]], row) for row, (layer, values) in enumerate(errors.items())]
        axes.plot(
            *zip(*rings, strict=True),
            "o",
            mfc="none",
            color="black",
            markersize=9,
            label="assigned",
        )
        axes.set_yticks(range(len(errors)), list(errors), fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel=axis, xscale="log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="x-small")

    return fill
