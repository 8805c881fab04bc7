"""accelerate: a training step of a Llama of bitsandbytes and PEFT layers, and forward and backward
of one such layer of any size, before and after `qlora_kernels.accelerate(model)`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import nn

import qlora_kernels as qlk
from bench.gpu.llama import Sizes
from bench.gpu.models import make_model
from bench.gpu.training import optimizer_for, step_of
from bench.grid import peers
from bench.records import Row, Settings
from qlora_kernels.testing.timing import time_interleaved

SIZES = Sizes(4096, 1024, 2816, 2, 16, 16)
SEQUENCE, RANK = 256, 16
# In fp32 both sides spend their time in the same GEMM of torch: there the rule is "never slower".
TIMES_FASTER = {torch.float32: 1.0, torch.bfloat16: 1.3}
STOCK = "QLoRA, PEFT + bitsandbytes"
# Layers that a call costs more than its products; they may never be slower than before either.
FEATURES, TOKENS = (64, 256, 512), (1, 64, 512)
DTYPES, DROPOUTS = (torch.float32, torch.bfloat16), (0.0, 0.05)
# Relative difference of two losses: each product is rounded to the dtype once.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def case_accelerate(
    settings: Settings,
    sizes: Sizes = SIZES,
    sequence: int = SEQUENCE,
    features: Sequence[int] = FEATURES,
    tokens: Sequence[int] = TOKENS,
) -> list[Row]:
    """In fp32 and in bf16, dropout 0.05 included as fine-tuning has it."""
    kinds = list(itertools.product(DTYPES, DROPOUTS))
    rows = [step(settings, sizes, sequence, *kind) for kind in kinds]
    for kind in kinds:
        rows += [layer(settings, *size, *kind) for size in itertools.product(features, tokens)]
    return rows


def layer(
    settings: Settings, features: int, tokens: int, dtype: torch.dtype, dropout: float
) -> Row:
    """Forward and backward of a square layer, stock and accelerated in turn."""
    torch.manual_seed(0)
    weight = torch.randn(features, features, dtype=dtype) / features**0.5
    stock = peers.peft_layer(peers.bnb_layer(qlk.get_format("nf4"), weight), RANK, dropout).train()
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # zeros, as it starts, would hide lora_A's gradient
    fused = copy.deepcopy(stock)
    report = qlk.accelerate(fused, verbose=False)
    assert len(report.fused) == 1 and not report.fallback, str(report)
    x = torch.randn(tokens, features, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(tokens, features, dtype=dtype)
    verify_layer(stock, fused, x, CLOSE[dtype])
    times = time_interleaved(
        {
            name: (lambda _, model=model: model(x).backward(grad_y))
            for name, model in (("ours", fused), ("peer", stock))
        },
        rounds=5 * settings.rounds,
        seconds=min(settings.seconds, 0.5),
        warmup=5,
    )
    work = f"{features} x {features} layer after accelerate(), {tokens} tokens, {named(dtype)}"
    work = f"{work}, dropout {dropout:g}"
    return Row(work, STOCK, times["ours"], times["peer"], times_faster=1.0)


def verify_layer(stock: nn.Module, fused: nn.Module, x: torch.Tensor, close: float) -> None:
    """Raises AssertionError where results or gradients differ; without dropout."""
    found = []
    for model in (stock, fused):
        probe = copy.deepcopy(model)
        for module in probe.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        given = x.detach().requires_grad_()
        y = probe(given)
        y.sum().backward()
        grads = [p.grad for p in probe.parameters() if p.grad is not None]
        found.append([y.detach(), given.grad, *grads])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        distance = (ours.float() - theirs.float()).norm()
        assert distance <= close * theirs.float().norm(), "a layer's results differ"


def named(dtype: torch.dtype) -> str:
    """A dtype as the table has it."""
    return str(dtype).removeprefix("torch.")


def step(
    settings: Settings, sizes: Sizes, sequence: int, dtype: torch.dtype, dropout: float
) -> Row:
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
        {name: (lambda _, run=run: run()) for name, run in steps.items()},
        rounds=min(settings.rounds, 20),
        seconds=settings.seconds,
        warmup=1,
    )
    work = f"training step after accelerate(), {named(dtype)}, dropout {dropout:g}"
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
