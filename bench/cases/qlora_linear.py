"""qlora_linear: what a LoRA adapter of rank 16 adds to the quantized matmul, and a whole layer's
forward and backward against PEFT's over the same kinds of weight."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import nn

import qlora_kernels as qlk
from bench.cases.quantized_matmul import bnb_layer, inputs
from bench.records import Row, Settings
from bench.shapes import DTYPE, WEIGHT, dense_weights, quantized_weights
from qlora_kernels.testing.errors import assert_as_accurate
from qlora_kernels.testing.timing import Rotation, time_interleaved

RANK, ALPHA = 16, 32


def case_qlora_linear(settings: Settings) -> list[Row]:
    """Added time at M = 1 and M = 512; training steps of one layer, and of q, k and v together."""
    limits = {"rounds": settings.rounds, "seconds": settings.seconds}
    weights = quantized_weights()
    verify(weights[0])
    rows = [added(weights, tokens, at_most, limits) for tokens, at_most in ((1, 1.3), (512, 1.08))]
    return [*rows, *training(weights, 512, limits), grouped(weights, 512, limits)]


def adapter() -> tuple[torch.Tensor, torch.Tensor]:
    """lora_a and lora_b in fp32."""
    generator = torch.Generator().manual_seed(1)
    rows, cols = WEIGHT
    lora_a = torch.randn(RANK, cols, generator=generator) * cols**-0.5
    return lora_a, torch.randn(rows, RANK, generator=generator) * 0.02


def verify(qw: qlk.QuantizedWeight) -> None:
    """Refuse to time what is wrong."""
    lora_a, lora_b = adapter()
    w = qlk.dequantize(qw, torch.float32)
    for tokens in (1, 512):
        x = inputs(tokens)
        y = qlk.qlora_linear(x, qw, lora_a, lora_b, ALPHA / RANK)
        exact = x.double() @ w.double().t()
        exact += ALPHA / RANK * (x.double() @ lora_a.double().t()) @ lora_b.double().t()
        a, b = lora_a.to(DTYPE), lora_b.to(DTYPE)
        plain = x @ w.to(DTYPE).t() + ALPHA / RANK * ((x @ a.t()) @ b.t())
        assert_as_accurate(y, exact, plain)


def added(weights: Rotation[qlk.QuantizedWeight], tokens: int, at_most: float, limits: dict) -> Row:
    """With the adapter against without."""
    x, (lora_a, lora_b) = inputs(tokens), adapter()
    with torch.no_grad():
        times = time_interleaved(
            {
                "ours": lambda i: qlk.qlora_linear(x, weights[i], lora_a, lora_b, ALPHA / RANK),
                "peer": lambda i: qlk.quantized_linear(x, weights[i]),
            },
            **limits,
        )
    work = f"forward M = {tokens} with LoRA, r = {RANK}"
    return Row(work, "ours without LoRA", times["ours"], times["peer"], at_most=at_most)


def peft_layer(base: nn.Linear) -> nn.Module:
    """PEFT's LoRA layer over a linear layer."""
    model = nn.Sequential(base)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    layer: nn.Module = peft.get_peft_model(model, config)
    return layer


def dense_layer(weight: torch.Tensor) -> nn.Linear:
    """An nn.Linear around a weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def training(weights: Rotation[qlk.QuantizedWeight], tokens: int, limits: dict) -> list[Row]:
    """Forward, grad_x and adapter gradients of one layer."""
    dense = dense_weights()
    ours = Rotation(
        lambda i: qlk.QLoRALinear.from_quantized(weights[i], rank=RANK, alpha=ALPHA),
        weights[0].nbytes,
    )
    peers = {
        "PEFT LoRA over dense bf16": Rotation(
            lambda i: peft_layer(dense_layer(dense[i])), dense[0].nbytes
        ),
        "PEFT LoRA over bitsandbytes": Rotation(
            lambda i: peft_layer(bnb_layer(weights[i])), weights[0].nbytes
        ),
        "our LoRALinear over dense bf16": Rotation(
            lambda i: qlk.LoRALinear(dense[i], rank=RANK, alpha=ALPHA), dense[0].nbytes
        ),
    }
    x, grad_y = inputs(tokens).requires_grad_(), inputs(tokens, WEIGHT[0])

    def step(layers: Rotation[nn.Module]) -> Callable[[int], None]:
        def run(i: int) -> None:
            x.grad = None
            layers[i].zero_grad(set_to_none=True)
            layers[i](x).backward(grad_y)

        return run

    rows = []
    for name, layers in peers.items():
        times = time_interleaved({"ours": step(ours), "peer": step(layers)}, **limits)
        work = f"LoRA layer, forward + backward M = {tokens}"
        rows.append(Row(work, name, times["ours"], times["peer"]))
    return rows


def grouped(weights: Rotation[qlk.QuantizedWeight], tokens: int, limits: dict) -> Row:
    """q, k and v of 4096, 1024 and 1024 features, forward and backward, as a QLoRAGroup."""
    fewer = quantized_weights((WEIGHT[0] // 4, WEIGHT[1]))

    def layers(i: int) -> list[nn.Module]:
        parts = [weights[i], fewer[2 * i], fewer[2 * i + 1]]
        return [qlk.QLoRALinear.from_quantized(qw, rank=RANK, alpha=ALPHA) for qw in parts]

    nbytes = weights[0].nbytes + 2 * fewer[0].nbytes
    separate = Rotation(layers, nbytes)
    groups = Rotation(lambda i: qlk.QLoRAGroup(separate[i]), nbytes)
    x = inputs(tokens).requires_grad_()
    grads = [inputs(tokens, layer.out_features) for layer in separate[0]]

    def step(outputs: Callable[[int], object]) -> Callable[[int], None]:
        def run(i: int) -> None:
            x.grad = None
            for layer in separate[i]:
                layer.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs(i), grads)

        return run

    times = time_interleaved(
        {
            "ours": step(lambda i: groups[i](x)),
            "peer": step(lambda i: [layer(x) for layer in separate[i]]),
        },
        **limits,
    )
    work = f"q, k, v as a group, forward + backward M = {tokens}"
    return Row(work, "the same layers one by one", times["ours"], times["peer"])
