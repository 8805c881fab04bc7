"""The plots of a report: losses over the steps, and memory by method. Needs matplotlib, which stays
optional (the `plot` extra).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kernels.files import write_atomically
from qlora_kernels.finetune.console import say
from qlora_kernels.finetune.outputs import LOSS_PLOT, MEMORY_PLOT, writing

# Okabe and Ito's palette, told apart by colour-blind eyes.
COLOURS = {"full": "#0072B2", "lora": "#E69F00", "qlora": "#009E73"}


def write_plots(out: Path, content: Mapping[str, Any]) -> list[str]:
    """Write the plots of a report and return their names; without matplotlib none, and say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is missing (pip install 'qlora_kernels[plot]')")
        return []
    drawn = {LOSS_PLOT: draw_losses, MEMORY_PLOT: draw_memory}
    for name, draw in drawn.items():
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        draw(figure.add_subplot(), content["methods"])
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=120)
        with writing(out / name):
            write_atomically(out / name, [png.getvalue()])
    return list(drawn)


def draw_losses(axes: Any, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Training loss of every step, faint, its running mean, and the held-out loss at both ends."""
    for method, values in methods.items():
        losses, colour = values["train_losses"], COLOURS[method]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(losses), color=colour, linewidth=1.8, label=method)
        held_out = [values["eval_loss_before"], values["eval_loss_after"]]
        axes.plot([0, len(losses)], held_out, "o", color=colour, markersize=6)
    axes.plot([], [], "o", color="grey", label="held-out, before and after")
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and those before it, over a tenth of the run."""
    width = max(1, len(values) // 10)
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means


def draw_memory(axes: Any, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Bars of the peak, and of the base weights in it."""
    for position, (method, values) in enumerate(methods.items()):
        for key, offset, alpha in (("peak_bytes", -0.2, 1.0), ("base_bytes", 0.2, 0.45)):
            size = values[key] / 1e6
            bar = axes.bar(position + offset, size, 0.36, color=COLOURS[method], alpha=alpha)
            axes.bar_label(bar, [f"{size:,.1f}"], padding=2)
    axes.bar(0, 0, color="grey", label="peak memory")
    axes.bar(0, 0, color="grey", alpha=0.45, label="of which base weights")
    axes.set_xticks(range(len(methods)), list(methods))
    axes.set(ylabel="MB", title="Memory")
    axes.margins(y=0.15)
    axes.legend(frameon=False)
