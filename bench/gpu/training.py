"""Stage "training": a whole step of a Llama-8B-shaped model, with each kind of layer."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.gpu.context import Context
from bench.gpu.llama import TINY, Sizes
from bench.gpu.models import KINDS, make_model, trained
from bench.grid.peers import FAILURES, PeerMissing, first_line
from qlora_kernels.testing.live_memory import LiveMemory

# A step's tokens, as in the figures; 16 are for the machinery only.
SEQUENCE, SMOKE_SEQUENCE = 2048, 16
WARMUP, STEPS = 2, 8


def optimizer_for(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the adapters: fused on a GPU, one parameter after another on a CPU."""
    options = {"fused": True} if device.type == "cuda" else {"foreach": False}
    return torch.optim.AdamW(trained(model), lr=1e-4, **options)


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Forward, backward, update; returns the loss."""

    def step() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peak_of(
    step: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, int]:
    """(bytes held before a step, most during it): the allocator's on a GPU, live tensors' else."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated()
    states = [
        tensor
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    ]
    memory = LiveMemory(*model.parameters(), *model.buffers(), *states)
    lasting = memory.now
    with memory:
        step()
    return lasting, memory.peak


def measure(
    step: Callable[[], torch.Tensor], device: torch.device, tokens: int, seconds: float
) -> dict[str, Any]:
    """Tokens a second of a step, and its loss.

    Raises:
        AssertionError: the loss is not finite; no time is told then.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARMUP):
        loss = step()
    assert bool(loss.isfinite()), f"the loss is {float(loss)}"
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < STEPS and (len(times) < 3 or time.perf_counter() - began < seconds):
        wait()
        start = time.perf_counter()
        loss = step()
        wait()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return {
        "tokens_per_second": round(tokens / median, 2),
        "step_ms": round(median * 1e3, 3),
        "fastest_ms": round(min(times) * 1e3, 3),
        "slowest_ms": round(max(times) * 1e3, 3),
        "steps": len(times),
        "loss": float(loss),
    }


def steps(context: Context) -> None:
    """Every kind at batch 1 and, while time is left, 4."""
    sizes = TINY if context.smoke else Sizes.named("llama-3-8b")
    sequence = SMOKE_SEQUENCE if context.smoke else SEQUENCE
    dtype = torch.float32 if context.smoke else torch.bfloat16
    rows: dict[str, Any] = dict(context.content.get("rows", {}))
    context.save(model=vars(sizes), sequence=sequence, rank=16, checkpointing=True, rows=rows)
    cases = [(batch, kind) for batch in (1, 4) for kind in KINDS]
    for number, (batch, kind) in enumerate(cases):
        name = f"{kind}, batch {batch}"
        if name in rows or context.left < 0:
            continue
        share = context.left / (len(cases) - number)
        rows[name] = one_kind(kind, sizes, context.device, dtype, batch, sequence, share)
        context.save(rows=rows)


def one_kind(
    kind: str,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    sequence: int,
    seconds: float,
    rank: int = 16,
) -> dict[str, Any]:
    """Figures of one kind, or why there are none."""
    try:
        model = make_model(kind, sizes, device, dtype, rank=rank)
        optimizer = optimizer_for(model, device)
        ids = torch.randint(sizes.vocabulary, (batch, sequence), device=device)
        step = step_of(model, optimizer, ids)
        figures = measure(step, device, batch * sequence, seconds / 2)
        lasting, peak = peak_of(step, model, optimizer)
        return {**figures, "lasting_bytes": lasting, "peak_bytes": peak}
    except PeerMissing as error:
        return {"missing": str(error)}
    except torch.OutOfMemoryError as error:
        return {"missing": f"out of memory: {str(error).splitlines()[0]}"}
    except (AssertionError, *FAILURES) as error:
        return {"refused": first_line(error)}
    finally:
        model = optimizer = step = None  # type: ignore[assignment]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
