"""Layers that share an input, for the tests of QLoRAGroup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import qlora_kernels as qlk

K = 64
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three projections of one x, as models call them."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in NAMES if hasattr(self, name))


def layer(
    rows: int,
    rank: int = 4,
    dropout: float = 0.0,
    bias: bool = True,
    double_quant: bool = True,
    **options: Any,
) -> qlk.QuantizedLinear:
    """Of rank 0: a layer without an adapter."""
    linear = nn.Linear(K, rows, bias=bias)
    if not rank:
        return qlk.QuantizedLinear.from_linear(linear, double_quant=double_quant, **options)
    made = qlk.QLoRALinear.from_linear(
        linear, rank=rank, dropout=dropout, double_quant=double_quant, **options
    )
    nn.init.normal_(made.lora_b, std=0.3)
    return made


def attention(dropout: float = 0.0, seed: int = 0) -> Attention:
    """Different ranks, one without an adapter's bias, one without an adapter, in training mode."""
    torch.manual_seed(seed)
    return Attention(
        q_proj=layer(96, 4, dropout),
        k_proj=layer(32, 0),
        v_proj=layer(32, 7, dropout, bias=False, double_quant=False),
    )


def tokens(dtype: torch.dtype = torch.float32, each: int = 5, seed: int = 1) -> Tensor:
    """x [2, each, K]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, each, K, generator=generator).to(dtype).requires_grad_()


def step(call: Callable[[Tensor], tuple[Tensor, ...]], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, grad_x, the adapters' gradients and the generator's state of a training step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(7)
    ys = call(x)
    state = torch.get_rng_state()
    # Summed in one order: the engine may take separate layers in any.
    torch.autograd.backward(ys, [torch.linspace(-1, 1, y.numel()).view_as(y).to(y) for y in ys])
    assert x.grad is not None
    grads = [p.grad for p in qlk.lora_parameters(model)]
    assert all(grad is not None for grad in grads)
    return [*(y.detach() for y in ys), x.grad, *grads, state]  # type: ignore[list-item]


@contextmanager
def packed() -> Iterator[list[Tensor]]:
    """What autograd saves for backward, each time it saves it."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
