"""The native inference call: the bits of the ops, and when it leaves a call to them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_kernels as qlk
from qlora_kernels.backends import registry
from qlora_kernels.backends.cpu.common import machine_isa
from qlora_kernels.backends.cpu.inference import native_linear
from qlora_kernels.backends.cpu.matmul_path import most_dot_tokens
from qlora_kernels.errors import QLKError
from qlora_kernels.ops import inference
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.tolerances import assert_linear

pytestmark = pytest.mark.skipif(machine_isa() < 0, reason="the native library is missing")

N, K, R = 48, 128, 5


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was computed in one piece."""
    seen: list[bool] = []
    original = inference.run_inference

    def recording(*arguments: Any) -> torch.Tensor | None:
        y = original(*arguments)
        seen.append(y is not None)
        return y

    callers = ("quantized_matmul", "qlora_linear"), ("quantized_linear", "qlora_linear")
    for package, names in zip(("autograd", "nn"), callers, strict=True):
        for name in names:
            caller = importlib.import_module(f"qlora_kernels.{package}.{name}")
            monkeypatch.setattr(caller, "run_inference", recording)
    return seen


def weight(double_quant: bool = True) -> qlk.QuantizedWeight:
    dense = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return qlk.quantize(dense, block_size=64, double_quant=double_quant)


def layers(double_quant: bool = True) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The same weight, bias and adapter as functions and as modules."""
    qw, bias = weight(double_quant), torch.randn(N)
    lora = qlk.QLoRALinear.from_quantized(qw, bias, rank=R).eval()
    with torch.no_grad():
        lora.lora_b.normal_()
    return [
        lambda x: qlk.quantized_linear(x, qw, bias),
        qlk.QuantizedLinear(qw, bias),
        lambda x: qlk.qlora_linear(x, qw, lora.lora_a, lora.lora_b, lora.scaling, bias),
        lora,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_inference_has_the_bits_of_the_ops(
    taken: list[bool], dtype: torch.dtype, double_quant: bool
) -> None:
    for layer in layers(double_quant):
        for shape in ((K,), (1, K), (3, K), (2, 2, K), (2, 1, 1, K)):
            x = torch.randn(shape).to(dtype)
            expected = layer(x)
            for mode in (torch.no_grad, torch.inference_mode):
                taken.clear()
                with mode():
                    y = layer(x)
                assert taken == [True] and y.shape == (*shape[:-1], N)
                assert_bitwise_equal(y, expected.detach())


def test_many_tokens_go_the_way_of_their_path(taken: list[bool]) -> None:
    layer = layers()[0]
    x = torch.randn(most_dot_tokens(machine_isa(), torch.float32) + 1, K)
    with torch.no_grad():
        assert_bitwise_equal(layer(x), layer(x.clone().requires_grad_()).detach())
    assert not any(taken)


class Kept(torch.Tensor):
    """A subclass that ops return again."""


class Watching(TorchDispatchMode):
    """A mode that sees every op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", []), func]
        return func(*args, **(kwargs or {}))


def test_what_has_to_see_the_ops_sees_them(taken: list[bool], monkeypatch: Any) -> None:
    layer, x = layers()[1], torch.randn(2, K)
    layer(x)
    with torch.no_grad():
        with Watching() as mode:
            layer(x)
        assert torch.ops.qlora_kernels.quantized_matmul.default in mode.seen
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with qlk.backend("reference"):
            layer(x)
        monkeypatch.setenv("QLK_BACKEND", "cpu:portable")
        layer(x)
        monkeypatch.delenv("QLK_BACKEND")
        torch.compile(layer, fullgraph=True, backend="eager")(x)
        assert not any(taken)
        taken.clear()
        qw = layer.quantized_weight
        traced = torch.jit.trace(lambda x: qlk.quantized_linear(x, qw), x, check_trace=False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(layer(x), FakeTensor)
        torch.func.vmap(layer)(x)
        torch.func.functional_call(layer, dict(layer.named_parameters()), x.as_subclass(Kept))
        assert len(taken) == 4 and not any(taken)
        assert_bitwise_equal(traced(x[:1]), qlk.quantized_linear(x[:1], qw))
        with qlk.backend("auto"):
            layer(x)
        assert taken[-1]


def test_what_the_kernel_does_not_take_goes_to_the_ops(taken: list[bool]) -> None:
    qw, x = weight(), torch.randn(2, K)
    with torch.no_grad():
        first = qlk.quantized_linear(x, qw)  # which makes the weight's operands
        assert not taken.pop()
        y = qlk.quantized_linear(x, qw)
        assert taken.pop()
        assert_bitwise_equal(y, first)
        assert_bitwise_equal(qlk.quantized_linear(x.t().contiguous().t(), qw), y)
        wide = qlk.quantized_linear(x.double(), qw)
        assert wide.dtype == torch.float64
        assert_linear(wide.float(), x, qlk.dequantize(qw).double())
        assert qlk.quantized_linear(x[:0], qw).shape == (0, N)
        for bad in (x[:, 1:], x.long(), x[0, 0]):
            with pytest.raises(QLKError, match="quantized_linear: x must be"):
                qlk.quantized_linear(bad, qw)
        for bias in (torch.randn(N + 1), torch.randn(N).long(), torch.randn(1, N)):
            with pytest.raises(QLKError, match="quantized_linear: bias must be"):
                qlk.quantized_linear(x, qw, bias)
        a, b = torch.randn(R, K), torch.randn(N, R)
        for pair in ((a[:, 1:], b), (a, b[1:]), (a.double(), b)):
            with pytest.raises(QLKError, match=r"qlora_linear: lora_. must be"):
                qlk.qlora_linear(x, qw, *pair, 1.0)
        small = qlk.quantize(torch.randn(N, K), block_size=16, format="nf4")
        assert qlk.quantized_linear(x, small).shape == (2, N)
    assert not any(taken)


def test_a_weight_of_a_subclass_is_taken() -> None:
    class Named(qlk.QuantizedWeight):
        """A user's own."""

    qw, x = weight(), torch.randn(2, K)
    own = Named(**{field.name: getattr(qw, field.name) for field in dataclasses.fields(qw)})
    with torch.no_grad():
        for _ in range(2):  # the first makes the weight's operands
            assert_bitwise_equal(qlk.quantized_linear(x, own), qlk.quantized_linear(x, qw))


def test_inference_reads_the_weight_that_the_layer_holds_now(taken: list[bool]) -> None:
    layer, x = qlk.QuantizedLinear(weight()), torch.randn(1, K)
    with torch.no_grad():
        before = layer(x)
        layer.weight.copy_(layer.weight.flip(0))
        changed = layer(x)
        layer.weight.data = layer.weight.data.flip(0)
        assert_bitwise_equal(layer(x), before)
        layer.weight = torch.nn.Parameter(layer.weight.flip(0), requires_grad=False)
        assert_bitwise_equal(layer(x), changed)
    assert all(taken) and not torch.equal(before, changed)


def test_a_kernel_registered_later_is_preferred(
    taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = ("quantized_matmul", "qlora_linear")
    monkeypatch.setattr(registry, "_ENTRIES", {op: registry.entries(op) for op in registry.OPS})
    x, qw = torch.randn(1, K), weight()

    def mine(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x.new_zeros(x.shape[0], N)

    try:
        with torch.no_grad():
            for _ in range(2):
                assert qlk.quantized_linear(x, qw).any()
            registry.register_kernel(ops[0], "mine", priority=1000, rejects=lambda _: None)(mine)
            assert not qlk.quantized_linear(x, qw).any()
    finally:
        monkeypatch.undo()
        registry._choose.cache_clear()
        native_linear.cache_clear()
    assert taken == [False, True, False]  # the first call makes the weight's operands
