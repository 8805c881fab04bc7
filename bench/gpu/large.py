"""Stage "sixty_five": LLaMA-65B trained on one card, and its smaller relatives, in real steps.

As in the QLoRA paper: NF4 with double quantization, LoRA of rank 64 on every linear layer, gradient
checkpointing, sequences of 512 tokens; the process may not take more than the card that is stood
in for. The peak is held against the planner's prediction.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.gpu.context import Context
from bench.gpu.llama import TINY, Sizes
from bench.gpu.models import OURS, make_model, trained
from bench.gpu.training import measure, optimizer_for, peak_of, step_of
from bench.grid.peers import FAILURES, PeerMissing, first_line, load
from bench.records import write_json
from qlora_kernels.integrations.plan import config_of, plan_memory

# Model -> bytes of the card it is to fit: the paper's claims (section 4 and figure 6), then the
# stretch goals.
CARDS: tuple[tuple[str, int], ...] = (
    ("llama-65b", 48 << 30),
    ("llama-33b", 24 << 30),
    ("llama-13b", 16 << 30),
    ("llama-7b", 8 << 30),
    ("llama-65b", 41 << 30),
)
# What the paper says of each, in its words; read as context, not as a bound.
PAPER = {
    "llama-65b": "41 GB of weights and below 48 GB trained",
    "llama-33b": "below 24 GB trained",
    "llama-7b": "5 GB",
}
SEQUENCE, RANK = 512, 64
SMOKE_SEQUENCE, SMOKE_RANK = 32, 8
# Written by `python -m bench.gpu.large`.
PREDICTIONS = Path(__file__).resolve().with_name("predictions.json")
WITHIN = 0.05


def optimizers(model: nn.Module, device: torch.device) -> tuple[str, torch.optim.Optimizer]:
    """(planner's name, optimizer): bitsandbytes' paged 8-bit AdamW on a GPU that has it, else
    torch's AdamW."""
    if device.type == "cuda":
        try:
            bnb: Any = load("bitsandbytes").optim
            return "adamw-8bit", bnb.PagedAdamW8bit(trained(model), lr=1e-4)
        except (PeerMissing, AttributeError):
            pass
    return "adamw", optimizer_for(model, device)


def config_for(sizes: Sizes) -> Any:
    """transformers' configuration of a Llama of these sizes; raises ImportError without it."""
    config = config_of("llama-7b")
    config.vocab_size, config.hidden_size = sizes.vocabulary, sizes.hidden
    config.intermediate_size, config.num_hidden_layers = sizes.intermediate, sizes.layers
    config.num_attention_heads, config.num_key_value_heads = sizes.heads, sizes.kv_heads
    config.head_dim = sizes.head_size
    return config


def prediction(
    sizes: Sizes, dtype: torch.dtype, sequence: int, optimizer: str, rank: int
) -> dict[str, int]:
    """The planner's bytes by part and in all; raises ImportError without transformers."""
    plan = plan_memory(
        config_for(sizes), seq_len=sequence, rank=rank, dtype=dtype, optimizer=optimizer
    )
    return {**vars(plan), "total": plan.total}


def predictions() -> dict[str, dict[str, int]]:
    """Of every model that is trained here, by model and optimizer: what `PREDICTIONS` holds."""
    return {
        f"{model}, {optimizer}": prediction(
            Sizes.named(model), torch.bfloat16, SEQUENCE, optimizer, RANK
        )
        for model in dict.fromkeys(name for name, _ in CARDS)
        for optimizer in ("adamw", "adamw-8bit")
    }


def planned(
    context: Context, name: str, sizes: Sizes, dtype: torch.dtype, optimizer: str
) -> dict[str, int]:
    """The planner's figures for a run: computed for the machinery's model, from the file for real
    ones, because the planner needs transformers and a GPU machine may have none."""
    if context.smoke:
        return prediction(sizes, dtype, SMOKE_SEQUENCE, optimizer, SMOKE_RANK)
    found: dict[str, dict[str, int]] = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    return found[f"{name}, {optimizer}"]


def models(context: Context) -> None:
    """Each model in turn, the largest first."""
    rows: dict[str, Any] = dict(context.content.get("rows", {}))
    context.save(rows=rows, paper=PAPER, within=WITHIN)
    cards = (("tiny", 0),) if context.smoke else CARDS
    for number, (name, card) in enumerate(cards):
        key = f"{name} in {card / 2**30:g} GiB" if card else name
        if key in rows or context.left < 0:
            continue
        sizes = TINY if context.smoke else Sizes.named(name)
        seconds = context.left / (len(cards) - number)
        rows[key] = one_model(context, name, sizes, card, seconds)
        context.save(rows=rows)


def one_model(
    context: Context, model_name: str, sizes: Sizes, card: int, seconds: float
) -> dict[str, Any]:
    """Steps of one model on a card of so many bytes (0: all there are)."""
    device, dtype = context.device, torch.float32 if context.smoke else torch.bfloat16
    sequence, rank = (SMOKE_SEQUENCE, SMOKE_RANK) if context.smoke else (SEQUENCE, RANK)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, card / total), device)
    try:
        model = make_model(OURS, sizes, device, dtype, rank=rank)
        name, optimizer = optimizers(model, device)
        ids = torch.randint(sizes.vocabulary, (1, sequence), device=device)
        step = step_of(model, optimizer, ids)
        figures = measure(step, device, sequence, seconds / 2)
        lasting, peak = peak_of(step, model, optimizer)
        plan = planned(context, model_name, sizes, dtype, name)
        return {
            **figures,
            "optimizer": type(optimizer).__name__,
            "lasting_bytes": lasting,
            "peak_bytes": peak,
            "card_bytes": card,
            "fits": peak <= card if card else None,
            "planned_bytes": plan,
            "peak_over_plan": round(peak / plan["total"] - 1, 4),
        }
    except torch.OutOfMemoryError as error:
        return {"fits": False, "card_bytes": card, "error": first_line(error)}
    except (AssertionError, *FAILURES) as error:
        return {"refused": first_line(error), "card_bytes": card}
    finally:
        model = optimizer = step = None  # type: ignore[assignment]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, device)


if __name__ == "__main__":
    print(write_json(PREDICTIONS, predictions()))
