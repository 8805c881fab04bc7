"""torch.compile takes whole layers, forward and backward, without a graph break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qlora_kernels as qlk
from tests.tolerances import assert_slope

LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "quantized": qlk.QuantizedLinear.from_linear,
    "qlora": lambda linear: qlk.QLoRALinear.from_linear(linear, rank=8),
    "qlora_dropout": lambda linear: qlk.QLoRALinear.from_linear(linear, rank=8, dropout=0.5),
    "qlora_absmax": lambda linear: qlk.QLoRALinear.from_linear(linear, rank=8, double_quant=False),
    "lora": lambda linear: qlk.LoRALinear.from_linear(linear, rank=8),
    "lora_dropout": lambda linear: qlk.LoRALinear.from_linear(linear, rank=8, dropout=0.5),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name](nn.Linear(96, 64))
    for parameter in qlk.lora_parameters(layer):
        nn.init.normal_(parameter, std=0.1)
    return layer


def run(call: Callable[[Tensor], Tensor], layer: nn.Module, tokens: int = 5) -> list[Tensor]:
    """y, grad_x and the adapter's gradients."""
    layer.zero_grad()
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 96, requires_grad=True)
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[parameter.grad for parameter in qlk.lora_parameters(layer)]]


@pytest.mark.parametrize("name", LAYERS)
def test_fullgraph_forward_and_backward(name: str) -> None:
    torch._dynamo.reset()
    layer = make(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, layer), run(layer, layer), strict=True):
        assert torch.equal(got, expected)


def test_a_dynamic_batch_is_compiled_once() -> None:
    torch._dynamo.reset()
    layer = make("qlora")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 40, 7):
        for got, expected in zip(
            run(compiled, layer, tokens), run(layer, layer, tokens), strict=True
        ):
            assert torch.equal(got, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(compiled, layer, 9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qlora_dropout", "lora_dropout"])
def test_inductor_replays_its_own_dropout(name: str) -> None:
    """Inductor draws another seed than eager does; backward must use the one of its forward."""
    torch._dynamo.reset()
    layer = make(name)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(64, 96, requires_grad=True)
    y = compiled(x)
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    bias = torch.zeros(64) if layer.bias is None else layer.bias
    dense, adapter = layer.dense_base(torch.float32), (layer.lora_a, layer.lora_b)
    assert_slope(y - bias, grad_x, x, torch.ones_like(y), dense, adapter, layer.scaling, 0.5)


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    torch._dynamo.reset()
    layer = make("qlora")
    compiled = torch.compile(layer, fullgraph=True)
    for got, expected in zip(run(compiled, layer), run(layer, layer), strict=True):
        torch.testing.assert_close(got, expected)
