"""The Llama with each kind of adapted layer that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import qlora_kernels as qlk
from bench.gpu.llama import Llama, Sizes
from bench.grid import peers

ALPHA = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OURS = "QLoRA, ours"
GROUPED = "QLoRA, ours, grouped"
# Kind -> what it is compared for. "PEFT's formula" stands in where PEFT is not installed.
KINDS = (
    OURS,
    GROUPED,
    "LoRA bf16, PEFT",
    "LoRA bf16, PEFT's formula",
    "LoRA bf16, ours",
    "QLoRA, PEFT + bitsandbytes",
    "QLoRA, PEFT + bitsandbytes, accelerated",
    "QLoRA, PEFT's formula + bitsandbytes",
)


def make_model(
    kind: str,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rank: int,
    dropout: float = 0.0,
    checkpointing: bool = True,
    seed: int = 0,
) -> nn.Module:
    """A model in training mode whose adapters alone are trained; the same weights for every kind.

    Raises:
        PeerMissing: the kind needs what is not installed.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def dense(rows: int, cols: int) -> torch.Tensor:
        values = torch.randn(rows, cols, generator=generator, device=device, dtype=dtype)
        return values.mul_(0.02)

    fmt = qlk.get_format("nf4")

    def ours(rows: int, cols: int) -> nn.Module:
        qw = qlk.quantize(dense(rows, cols), fmt)
        return qlk.QLoRALinear.from_quantized(qw, rank=rank, alpha=ALPHA, dropout=dropout)

    bases: dict[str, Callable[[int, int], nn.Module]] = {
        OURS: ours,
        GROUPED: ours,
        "LoRA bf16, ours": lambda n, k: qlk.LoRALinear(
            dense(n, k), rank=rank, alpha=ALPHA, dropout=dropout
        ),
    }

    def base(rows: int, cols: int) -> nn.Module:
        weight = dense(rows, cols)
        return (
            peers.bnb_layer(fmt, weight) if "bitsandbytes" in kind else peers.dense_linear(weight)
        )

    def formula(rows: int, cols: int) -> nn.Module:
        return peers.UnfusedLoRA(base(rows, cols), rows, cols, rank, ALPHA, dropout)

    linear = bases.get(kind, formula if "formula" in kind else base)
    torch.manual_seed(seed)
    model: nn.Module = Llama(sizes, linear, device, dtype, checkpointing, generator)
    if kind == GROUPED:
        qlk.group_projections(model)
    if "PEFT" in kind and "formula" not in kind:
        peft = peers.load("peft")
        if "bitsandbytes" in kind:
            model.is_loaded_in_4bit = True  # type: ignore[assignment]
        config = peft.LoraConfig(
            r=rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(TARGETS)
        )
        model = peft.get_peft_model(model, config)
        if "accelerated" in kind:
            qlk.accelerate(model, verbose=False)
    return model.train()


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """What an optimizer gets."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
