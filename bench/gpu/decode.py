"""Stage "decode": tokens a second of a Llama-8B-shaped model with an adapter, one token a step,
a CUDA graph of the step where it can be captured."""

from __future__ import annotations

import gc
from typing import Any

import torch

from bench.gpu.context import Context
from bench.gpu.llama import TINY, Sizes
from bench.gpu.models import KINDS, make_model
from bench.grid.peers import FAILURES, PeerMissing, first_line
from bench.records import statistics_ms
from qlora_kernels.testing.timing import clock_for

POSITIONS, SMOKE_POSITIONS = 1024, 16
BATCHES = (1, 2, 4, 8, 16)


def tokens(context: Context) -> None:
    """Every kind at every batch size."""
    sizes = TINY if context.smoke else Sizes.named("llama-3-8b")
    positions = SMOKE_POSITIONS if context.smoke else POSITIONS
    batches = BATCHES[:2] if context.smoke else BATCHES
    rows: dict[str, Any] = dict(context.content.get("rows", {}))
    context.save(model=vars(sizes), positions=positions, rank=16, rows=rows)
    for number, kind in enumerate(KINDS):
        if kind in rows or context.left < 0:
            continue
        seconds = context.left / (len(KINDS) - number) / len(batches) / 2
        try:
            rows[kind] = one_kind(context, kind, sizes, positions, batches, seconds)
        except PeerMissing as error:
            rows[kind] = {"missing": str(error)}
        except FAILURES as error:
            rows[kind] = {"refused": first_line(error)}
        context.save(rows=rows)


def one_kind(
    context: Context,
    kind: str,
    sizes: Sizes,
    positions: int,
    batches: tuple[int, ...],
    seconds: float,
) -> dict[str, Any]:
    """Figures by batch size; raises PeerMissing where the kind needs what is not installed."""
    device, dtype = context.device, torch.float32 if context.smoke else torch.bfloat16
    model: Any = make_model(kind, sizes, device, dtype, rank=16, checkpointing=False).eval()
    bare = getattr(model, "base_model", model)
    bare = getattr(bare, "model", bare)  # PEFT wraps the model twice
    found: dict[str, Any] = {}
    for batch in batches:
        caches = bare.new_caches(batch, positions)
        ids = torch.randint(sizes.vocabulary, (batch, 1), device=device)
        # Attention reads the whole cache: the cost of the last position of a long text.
        position = torch.tensor([positions - 1], device=device)

        def step(
            _: int, ids: torch.Tensor = ids, caches: Any = caches, at: torch.Tensor = position
        ) -> object:
            return model(input_ids=ids, caches=caches, position=at).logits

        with torch.no_grad():
            logits = step(0)
            if not bool(logits.isfinite().all()):  # type: ignore[attr-defined]
                found[str(batch)] = {"refused": "logits are not finite"}
                continue
            clock = clock_for(device)
            timing = clock.time({kind: step}, rounds=20, seconds=seconds, copies=4)[kind]
        found[str(batch)] = {
            "tokens_per_second": round(batch / timing.median, 2),
            "step_ms": statistics_ms(timing),
            "how": timing.how,
        }
    model = bare = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found
