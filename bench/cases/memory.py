"""memory: bytes that a LoRA layer, a model and a training step hold, against peers and the plan."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

import qlora_kernels as qlk
from bench.gpu.llama import Sizes
from bench.gpu.models import KINDS, OURS, make_model
from bench.gpu.training import optimizer_for, peak_of, step_of
from bench.grid import peers
from bench.records import BytesRow, Settings
from qlora_kernels.testing.live_memory import saved_bytes

SHAPE, TOKENS, RANK = (2048, 2048), 512, 16
# Beyond its input, of the input's bytes; stock PEFT keeps 1.1 to 4 times them.
LAYER_SHARE = 0.05
# Of the plan: a planned step is within a tenth of a real one.
PLAN_SHARE = 1.1
MODEL = Sizes(4096, 512, 1408, 4, 8, 8)
SEQUENCE = 256


def case_memory(settings: Settings) -> list[BytesRow]:
    """All three; nothing of it depends on the machine's speed."""
    return [*layer_rows(), *model_rows(), *step_rows()]


def layers(dropout: float) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """(name, what makes it) of each kind of LoRA layer over one bf16 weight."""
    dense = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    fmt = qlk.get_format("nf4")

    def bitsandbytes(fused: bool) -> nn.Module:
        model = peers.peft_layer(peers.bnb_layer(fmt, dense), RANK, dropout)
        if fused:
            qlk.accelerate(model, verbose=False)
        return model

    yield (
        "ours",
        lambda: qlk.QLoRALinear.from_quantized(
            qlk.quantize(dense, fmt), rank=RANK, dropout=dropout
        ),
    )
    yield "bitsandbytes + PEFT, accelerated", lambda: bitsandbytes(True)
    yield "PEFT over bf16", lambda: peers.peft_layer(peers.dense_linear(dense), RANK, dropout)
    yield "PEFT over bitsandbytes", lambda: bitsandbytes(False)


def layer_rows() -> Iterator[BytesRow]:
    """What is saved for backward beyond x."""
    for dropout in (0.0, 0.1):
        held: dict[str, int] = {}
        for name, make in layers(dropout):
            try:
                layer = make().train()
            except peers.PeerMissing as error:
                print(f"memory: {name} is missing: {error}", file=sys.stderr)
                continue
            x = torch.randn(TOKENS, SHAPE[1]).bfloat16().requires_grad_()
            held[name] = saved_bytes(lambda layer=layer, x=x: layer(x), [x, *layer.parameters()])  # type: ignore[misc]
        work = f"saved beyond x, LoRA layer, dropout {dropout:g}"
        nbytes = TOKENS * SHAPE[1] * 2
        yield BytesRow(work, "x itself", held["ours"], nbytes, LAYER_SHARE)
        for name in list(held)[1:]:
            share = f"{held[name] / nbytes:.2f} of x"
            if "accelerated" in name:
                yield BytesRow(f"{work}, accelerated", "x itself", held[name], nbytes, LAYER_SHARE)
            else:
                yield BytesRow(work, name, held["ours"], held[name], note=f"peer's: {share}")


def model_rows() -> Iterator[BytesRow]:
    """What a model's forward leaves for its backward, without checkpointing."""
    held: dict[str, int] = {}
    ids = torch.randint(MODEL.vocabulary, (1, SEQUENCE))
    for kind in KINDS:
        try:
            model = make_model(
                kind, MODEL, torch.device("cpu"), torch.bfloat16, rank=RANK, checkpointing=False
            )
        except peers.PeerMissing as error:
            print(f"memory: {kind} is missing: {error}", file=sys.stderr)
            continue
        held[kind] = saved_bytes(lambda m=model: m(input_ids=ids, labels=ids), model.parameters())  # type: ignore[misc]
    for kind in held:
        if kind != OURS:
            yield BytesRow("saved by a model's forward", kind, held[OURS], held[kind])


def step_rows() -> Iterator[BytesRow]:
    """Most live bytes during a training step with checkpointing."""
    peaks: dict[str, int] = {}
    device = torch.device("cpu")
    ids = torch.randint(MODEL.vocabulary, (1, SEQUENCE))
    for kind in KINDS:
        try:
            model = make_model(kind, MODEL, device, torch.bfloat16, rank=RANK)
        except peers.PeerMissing:
            continue
        optimizer = optimizer_for(model, device)
        step = step_of(model, optimizer, ids)
        step()
        peaks[kind] = peak_of(step, model, optimizer)[1]
        del model, optimizer, step
        gc.collect()
    for kind in peaks:
        if kind != OURS:
            yield BytesRow("peak of a training step", kind, peaks[OURS], peaks[kind])
    try:
        from bench.gpu.large import prediction

        plan = prediction(MODEL, torch.bfloat16, SEQUENCE, "adamw", RANK)["total"]
    except ImportError as error:
        print(f"memory: no plan: {error}", file=sys.stderr)
        return
    work = "peak of a training step, ours"
    yield BytesRow(work, "the plan", peaks[OURS], plan, PLAN_SHARE)
