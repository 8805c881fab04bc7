"""accelerate: a training step of a Llama of bitsandbytes and PEFT layers, before and after
`qlora_kernels.accelerate(model)`."""

from __future__ import annotations

import copy

import torch
from torch import nn

import qlora_kernels as qlk
from bench.gpu.llama import Sizes
from bench.gpu.models import make_model
from bench.gpu.training import optimizer_for, step_of
from bench.records import Row, Settings
from qlora_kernels.testing.timing import time_interleaved

SIZES = Sizes(4096, 1024, 2816, 2, 16, 16)
SEQUENCE, RANK = 256, 16
# In fp32 both sides spend their time in the same GEMM of torch: there the rule is "never slower".
TIMES_FASTER = {torch.float32: 1.0, torch.bfloat16: 1.3}
STOCK = "QLoRA, PEFT + bitsandbytes"
# Relative difference of two losses: each product is rounded to the dtype once.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def case_accelerate(
    settings: Settings, sizes: Sizes = SIZES, sequence: int = SEQUENCE
) -> list[Row]:
    """In fp32 and in bf16, dropout 0.05 included as fine-tuning has it."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.05):
            rows.append(one(settings, sizes, sequence, dtype, dropout))
    return rows


def one(settings: Settings, sizes: Sizes, sequence: int, dtype: torch.dtype, dropout: float) -> Row:
    """Stock and accelerated steps in turn, from the same weights."""
    device = torch.device("cpu")
    options = {"rank": RANK, "dropout": dropout, "checkpointing": False}
    stock = make_model(STOCK, sizes, device, dtype, **options)  # type: ignore[arg-type]
    fused = copy.deepcopy(stock)
    report = qlk.accelerate(fused, verbose=False)
    expected = 7 * sizes.layers
    assert len(report.fused) == expected and not report.fallback, str(report)
    ids = torch.randint(sizes.vocabulary, (1, sequence), generator=torch.Generator().manual_seed(0))
    # On copies: in eval mode bitsandbytes repacks its weights where the CPU has bf16 products, and
    # what trains on them afterwards is faster by the gradients that no longer flow.
    verify(copy.deepcopy(stock), copy.deepcopy(fused), ids, CLOSE[dtype])
    steps = {
        "ours": step_of(fused, optimizer_for(fused, device), ids),
        "peer": step_of(stock, optimizer_for(stock, device), ids),
    }
    times = time_interleaved(
        {name: (lambda _, step=step: step()) for name, step in steps.items()},
        rounds=min(settings.rounds, 20),
        seconds=settings.seconds,
        warmup=1,
    )
    name = str(dtype).removeprefix("torch.")
    work = f"training step after accelerate(), {name}, dropout {dropout:g}"
    return Row(work, STOCK, times["ours"], times["peer"], times_faster=TIMES_FASTER[dtype])


def verify(stock: nn.Module, fused: nn.Module, ids: torch.Tensor, close: float) -> None:
    """Raises AssertionError where the losses differ; in eval mode, where no dropout is drawn."""
    losses = []
    for model in (stock, fused):
        model.eval()
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
        model.train()
    assert abs(losses[0] - losses[1]) <= close * abs(losses[0]), f"losses {losses}"
