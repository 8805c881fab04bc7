"""What a run found: report.json for programs, and one table for people, as text and as Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_kernels.files import write_text
from qlora_kernels.finetune.outputs import REPORT, REPORT_KIND, REPORT_TEXT, writing


@dataclass(frozen=True)
class MethodReport:
    """One method's results.

    Attributes:
        method: full, lora or qlora.
        settings: every option that decides the result (`Settings.compared_on_resume`).
        text: digest of the training and held-out tokens.
        train_losses: one a step, before it; nats per token, as every loss here.
        eval_loss_before, eval_loss_after: held-out loss. QLoRA's before is the quantized model's.
        trainable_parameters, total_parameters: the latter counts base and adapters.
        base_bytes: of the base weights: codes, scales and what stayed dense.
        bits_per_parameter: base_bytes over the dense base model's parameters.
        quantized_bits_per_parameter: the same over quantized weights alone; None if there are none.
        peak_bytes: see `memory`.
        tokens_per_second: over the training steps alone.
        gain_recovered: the fall from the dense base model's held-out loss to eval_loss_after, as a
            share of full fine-tuning's; None outside a comparison.
    """

    method: str
    settings: dict[str, object]
    text: str
    train_losses: list[float]
    eval_loss_before: float
    eval_loss_after: float
    trainable_parameters: int
    total_parameters: int
    base_bytes: int
    bits_per_parameter: float
    quantized_bits_per_parameter: float | None
    peak_bytes: int
    tokens_per_second: float
    gain_recovered: float | None = None


def document(command: str, reports: Sequence[MethodReport]) -> dict[str, Any]:
    """What report.json holds; ``command`` is the --method that was asked for."""
    return {
        "kind": REPORT_KIND,
        "command": command,
        "machine": machine(),
        "methods": {report.method: asdict(report) for report in reports},
    }


def machine() -> dict[str, object]:
    """What the speed and, in the last bits, the losses depend on."""
    facts: dict[str, object] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def cpu_name() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_report(out: Path, content: Mapping[str, Any]) -> None:
    """Write report.json."""
    with writing(out / REPORT):
        write_text(out / REPORT, json.dumps(content, indent=1, allow_nan=False) + "\n")


def with_gains(methods: Mapping[str, Mapping[str, Any]]) -> list[MethodReport]:
    """The methods of a comparison with `gain_recovered`: None where full fine-tuning gained
    nothing."""
    full = methods["full"]
    base = full["eval_loss_before"]
    gain = base - full["eval_loss_after"]
    return [
        MethodReport(
            **{
                **values,
                "gain_recovered": (base - values["eval_loss_after"]) / gain if gain > 0 else None,
            }
        )
        for values in methods.values()
    ]


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


Row = tuple[str, Callable[[Mapping[str, Any]], str]]

ROWS: tuple[Row, ...] = (
    ("trained parameters", lambda m: f"{m['trainable_parameters']:,}"),
    ("  share of all", lambda m: percent(m["trainable_parameters"] / m["total_parameters"])),
    ("base weights", lambda m: megabytes(m["base_bytes"])),
    ("bits per parameter", lambda m: f"{m['bits_per_parameter']:.2f}"),
    (
        "  where quantized",
        lambda m: (
            "-"
            if m["quantized_bits_per_parameter"] is None
            else f"{m['quantized_bits_per_parameter']:.3f}"
        ),
    ),
    ("peak memory", lambda m: megabytes(m["peak_bytes"])),
    ("tokens/s", lambda m: f"{m['tokens_per_second']:,.0f}"),
    ("held-out loss before", lambda m: f"{m['eval_loss_before']:.4f}"),
    ("held-out loss after", lambda m: f"{m['eval_loss_after']:.4f}"),
)
GAIN_ROW: Row = (
    "gain recovered",
    lambda m: "-" if m["gain_recovered"] is None else percent(m["gain_recovered"]),
)


def cells(content: Mapping[str, Any]) -> list[list[str]]:
    """The table: a header, then one row a quantity and one column a method."""
    methods = content["methods"]
    rows = (*ROWS, GAIN_ROW) if content["command"] == "compare" else ROWS
    table = [["", *methods]]
    table += [[label, *(show(values) for values in methods.values())] for label, show in rows]
    return table


def text_table(content: Mapping[str, Any]) -> str:
    """The table with aligned columns."""
    table = cells(content)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for label, *values in table:
        padded = (value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        lines.append("  ".join([label.ljust(widths[0]), *padded]))
    return "\n".join(lines) + "\n"


def markdown(content: Mapping[str, Any], plots: Sequence[str]) -> str:
    """report.md: the table, the plots that exist, what its rows mean, options and machine."""
    header, *rows = cells(content)
    lines = ["# Fine-tuning report", ""]
    lines.append("| " + " | ".join(header) + " |")
    lines.append("|---|" + "---:|" * (len(header) - 1))
    lines += ["| " + " | ".join([row[0].strip(), *row[1:]]) + " |" for row in rows]
    lines += ["", *(f"![{Path(name).stem}]({name})" for name in plots)]
    lines += ["", NOTES.strip()]
    if content["command"] == "compare":
        lines += [GAIN_NOTE.strip()]
    lines += ["", "Options:", "", *option_lines(content["methods"])]
    facts = ", ".join(f"{name} {value}" for name, value in content["machine"].items())
    lines += ["", f"Machine: {facts}", ""]
    return "\n".join(lines)


NOTES = """
- Losses are nats per token, on held-out text. Before training, a quantized model is already a
  little worse than the dense one.
- Base weights are all weights of the model but adapters: codes and scales where it is quantized,
  and what stays dense (embeddings, norms, output layer). Bits per parameter are those bytes.
- Peak memory is the highest of the method's own process, beyond what interpreter, libraries and
  text take; on a GPU, the allocator's highest.
- tokens/s counts training steps only.
"""
GAIN_NOTE = """
- Gain recovered: how far the held-out loss fell below the dense base model's, as a share of how far
  full fine-tuning brought it.
"""


def option_lines(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One bullet an option; options that differ between methods give each method's value."""
    settings = {method: values["settings"] for method, values in methods.items()}
    first = next(iter(settings.values()))
    lines = []
    for name in first:
        values = {method: options[name] for method, options in settings.items()}
        if name == "method":
            continue
        shown = [f"{value}" for value in values.values()]
        if len(set(shown)) > 1:
            shown = [f"{value} ({method})" for method, value in values.items()]
        else:
            shown = shown[:1]
        lines.append(f"- {name}: {', '.join(shown)}")
    return lines


def write_markdown(out: Path, content: Mapping[str, Any], plots: Sequence[str]) -> None:
    """Write report.md."""
    with writing(out / REPORT_TEXT):
        write_text(out / REPORT_TEXT, markdown(content, plots))
