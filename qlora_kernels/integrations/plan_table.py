"""plan --table: the model sizes of the QLoRA paper, what it says of their memory, and the plan."""

from __future__ import annotations

from typing import Any

from qlora_kernels.integrations.plan import SHAPES, Plan, config_of, plan_memory

GB = 10**9
# "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314): memory of the Guanaco models,
# table 1, in GB. They are the 4-bit weights and what the authors' program held beside them.
PAPER_GUANACO = {"llama-7b": 6, "llama-13b": 10, "llama-33b": 21, "llama-65b": 41}
# Section 1: full fine-tuning of 65B in 16 bits takes "more than 780 GB", 65e9 x 12 bytes (weights,
# gradients, Adam's two fp32 moments); with QLoRA it takes "less than 48 GB", and 33B, with paged
# optimizers, a card of 24. The GB of a card are 2^30 bytes: 25.8 and 51.5 of the table's.
PAPER_FULL_65B = 780
PAPER_CARD = {"llama-33b": 24, "llama-65b": 48}
BYTES_FULL = 12


def plan_table(**options: Any) -> str:
    """A Markdown table: a row for each of `SHAPES`, the paper's numbers where it has them.

    Args:
        options: of `plan_memory`.

    Raises:
        ArgumentError, ImportError: as `plan_memory`.
    """
    head = (
        "model",
        "parameters",
        "base, 4 bits",
        "paper's model",
        "all of a step",
        "paper's card",
        "full, 16 bits",
        "paper's full",
    )
    rows = [head, ("---", *("---:" for _ in head[1:]))]
    for name in SHAPES:
        plan = plan_memory(config_of(name), **options)
        parameters = parameter_count(name)
        rows.append(
            (
                name,
                f"{parameters / 1e9:.2f}e9",
                f"{base_bytes(plan) / GB:.1f} GB",
                _gigabytes(PAPER_GUANACO.get(name)),
                f"{plan.total / GB:.1f} GB",
                _gigabytes(PAPER_CARD.get(name), "< "),
                f"{parameters * BYTES_FULL / GB:.0f} GB",
                _gigabytes(PAPER_FULL_65B if name == "llama-65b" else None, "> "),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def base_bytes(plan: Plan) -> int:
    """The model as it is held: 4-bit weights with their scales, and what stays dense."""
    return plan.codes + plan.scales + plan.dense


def parameter_count(name: str) -> int:
    """Weights of one of `SHAPES`."""
    vocabulary, hidden, intermediate, layers, heads, kv_heads = SHAPES[name]
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads * kv_heads)
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    return layers * layer + 2 * vocabulary * hidden + hidden


def _gigabytes(size: int | None, sign: str = "") -> str:
    return "-" if size is None else f"{sign}{size} GB"
