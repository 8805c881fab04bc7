"""QuantizedLinear, QLoRALinear, LoRALinear: what they compute, hold, save and give back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.errors import ArgumentError, ArgumentTypeError
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.tolerances import assert_linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CLASSES = (qlk.QuantizedLinear, qlk.QLoRALinear, qlk.LoRALinear)


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 65, bias=bias, dtype=dtype)


def adapted(cls: type = qlk.QLoRALinear, source: nn.Linear | None = None, **options: Any) -> Any:
    """A layer whose adapter is not zero."""
    torch.manual_seed(1)
    layer = cls.from_linear(source or linear(), **({"rank": 8} | options))
    nn.init.normal_(layer.lora_b, std=0.1)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_linear_is_the_function(dtype: torch.dtype, bias: bool) -> None:
    source = linear(dtype, bias)
    layer = qlk.QuantizedLinear.from_linear(source, format="fp4", block_size=128)
    qw = qlk.quantize(source.weight, "fp4", 128)
    x = torch.randn(3, 5, 96).to(dtype)
    assert_bitwise_equal(layer(x), qlk.quantized_linear(x, qw, source.bias))
    assert_bitwise_equal(layer.dequantize(), qlk.dequantize(qw))
    assert layer.quantized_weight.bits_per_parameter == qw.bits_per_parameter
    assert isinstance(layer, nn.Linear) and "format=fp4" in repr(layer)


@pytest.mark.parametrize("rslora", [False, True])
def test_qlora_linear_is_the_function(rslora: bool) -> None:
    layer = adapted(rslora=rslora, alpha=12.0)
    assert layer.scaling == (12 / 8**0.5 if rslora else 1.5)
    x = torch.randn(7, 96)
    expected = qlk.qlora_linear(
        x, layer.quantized_weight, layer.lora_a, layer.lora_b, layer.scaling, layer.bias
    )
    assert_bitwise_equal(layer(x), expected)


@pytest.mark.parametrize("cls", [qlk.QLoRALinear, qlk.LoRALinear])
def test_a_fresh_adapter_changes_nothing_and_learns(cls: type) -> None:
    layer = cls.from_linear(linear(), rank=8, dropout=0.1)
    x = torch.randn(7, 96)
    assert_linear(
        layer(x).detach(), x, layer.dense_base(torch.float32).double(), layer.bias.detach()
    )
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_a", "lora_b"]
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    target, losses = torch.randn(7, 65), []
    for _ in range(60):
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_init_follows_torchs_generator_and_the_usual_distribution() -> None:
    a = [adapted().lora_a for _ in range(2)]
    assert torch.equal(*a)
    bound = 96**-0.5  # Kaiming uniform with a = √5: 1 / √K
    assert a[0].abs().max() <= bound and a[0].abs().max() > 0.9 * bound
    assert torch.count_nonzero(qlk.LoRALinear.from_linear(linear(), rank=8).lora_b) == 0


def test_dropout_acts_in_training_only() -> None:
    layer = adapted(dropout=0.5)
    x = torch.randn(7, 96)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_round_trip(cls: type, double_quant: bool) -> None:
    options: dict[str, Any] = {} if cls is qlk.QuantizedLinear else {"rank": 8}
    if cls is not qlk.LoRALinear:
        options["double_quant"] = double_quant
    layers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layers.append(cls.from_linear(nn.Linear(96, 65), **options))
        if "lora_b" in layers[-1].state_dict():
            nn.init.normal_(layers[-1].lora_b)
    first, second = layers
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    x = torch.randn(7, 96)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert_bitwise_equal(second(x), first(x))
    for name, tensor in first.state_dict().items():
        assert_bitwise_equal(second.state_dict()[name], tensor, name)


def test_a_state_of_another_format_is_refused() -> None:
    nf4 = qlk.QuantizedLinear.from_linear(linear(), format="nf4")
    fp4 = qlk.QuantizedLinear.from_linear(linear(), format="fp4")
    with pytest.raises(RuntimeError, match="the state's codebook is not that of format 'fp4'"):
        fp4.load_state_dict(nf4.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        blocks = qlk.QuantizedLinear.from_linear(linear(), block_size=128)
        nf4.load_state_dict(blocks.state_dict())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(cls: type, how: str) -> None:
    layer = cls.from_linear(linear()) if cls is qlk.QuantizedLinear else adapted(cls)
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = torch.randn(7, 96)
    assert_bitwise_equal(twin(x), layer(x))
    pairs = zip(twin.state_dict().values(), layer.state_dict().values(), strict=True)
    assert all(mine.data_ptr() != theirs.data_ptr() for mine, theirs in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_a_module_leaves_the_stored_weight_alone(dtype: torch.dtype) -> None:
    layer = adapted()
    before = {name: t.clone() for name, t in layer.quantized_weight.tensors().items()}
    layer.to(dtype)
    assert layer.lora_a.dtype == layer.bias.dtype == dtype
    for name, tensor in layer.quantized_weight.tensors().items():
        assert_bitwise_equal(tensor, before[name], name)
    assert layer(torch.randn(3, 96, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("cls", CLASSES)
def test_a_forward_changes_nothing(cls: type) -> None:
    layer = cls.from_linear(linear()) if cls is qlk.QuantizedLinear else adapted(cls)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for training in (True, False):
        layer.train(training)
        for tokens in (1, 3, 40):
            x = torch.randn(tokens, 96, requires_grad=True)
            layer(x).sum().backward()
            with torch.no_grad():
                layer(x)
    after = layer.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert_bitwise_equal(after[name], tensor, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [qlk.QLoRALinear, qlk.LoRALinear])
def test_merge_is_the_sum_and_unmerge_is_exact(cls: type, dtype: torch.dtype) -> None:
    layer = adapted(cls, linear(dtype))
    x = torch.randn(7, 96).to(dtype)
    before, y = copy.deepcopy(layer.state_dict()), layer(x)
    merged = layer.merge()
    exact = layer.dense_base(torch.float32) + layer.scaling * (layer.lora_b @ layer.lora_a)
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype
    assert_bitwise_equal(merged.weight, exact.to(dtype))
    layer.eval()
    assert_bitwise_equal(layer(x), merged(x))
    assert list(layer.state_dict()) == list(before)
    layer.unmerge()
    layer.train()
    assert_bitwise_equal(layer(x), y)
    for name, tensor in layer.state_dict().items():
        assert_bitwise_equal(tensor, before[name], name)


def test_a_merged_layer_refuses_to_be_trained_and_travels_whole() -> None:
    layer = adapted()
    x = torch.randn(7, 96)
    layer.merge()
    with pytest.raises(ArgumentError, match="layer must be unmerged to be trained"):
        layer(x)
    layer.eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.merged is not None and twin.merged is not layer.merged
        assert_bitwise_equal(twin(x), layer(x))
    dense, bias = layer.dense_base(torch.float32) + layer.delta_weight(), layer.bias.detach()
    layer.to(torch.bfloat16)
    assert layer.merged.weight.dtype == torch.bfloat16
    x = x.bfloat16()
    assert_linear(layer(x).detach(), x, dense.detach().double(), bias)


def test_constructors_refuse_what_does_not_fit() -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: adapted(rank=66), ArgumentError, r"rank must be a whole number in 1 … 65"),
        (lambda: adapted(rank=0), ArgumentError, "rank must be"),
        (lambda: adapted(rank=2.0), ArgumentError, "rank must be"),
        (lambda: adapted(dropout=-0.1), ArgumentError, "dropout must be in 0 … 1"),
        (lambda: adapted(alpha=float("inf")), ArgumentError, "alpha must be finite"),
        (
            lambda: qlk.QuantizedLinear.from_linear(nn.Conv1d(1, 1, 1)),
            ArgumentTypeError,
            "linear must be an nn.Linear",
        ),
        (
            lambda: qlk.QuantizedLinear.from_linear(linear().double()),
            ArgumentTypeError,
            "got torch.float64",
        ),
        (
            lambda: qlk.QuantizedLinear.from_linear(nn.Linear(4, 4, device="meta")),
            ArgumentError,
            "a meta weight",
        ),
        (lambda: qlk.QuantizedLinear(torch.ones(4, 4)), ArgumentTypeError, "QuantizedWeight"),
        (lambda: qlk.LoRALinear(torch.ones(4)), ArgumentError, "weight must be 2-D"),
        (lambda: adapted()(torch.randn(3, 95)), ArgumentError, r"QLoRALinear: x must be"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_from_quantized_copies_nothing() -> None:
    qw = qlk.quantize(torch.randn(64, 96))
    layer = qlk.QLoRALinear.from_quantized(qw, rank=4)
    held = layer.quantized_weight.tensors()
    assert all(held[name].data_ptr() == tensor.data_ptr() for name, tensor in qw.tensors().items())


def test_batch_invariant_layers() -> None:
    layer = adapted(batch_invariant=True).eval()
    x = torch.randn(50, 96)
    assert_bitwise_equal(layer(x[3:4]), layer(x)[3:4])


@pytest.mark.parametrize("cls", CLASSES)
def test_no_grad_and_inference_mode(cls: type) -> None:
    layer = cls.from_linear(linear()) if cls is qlk.QuantizedLinear else adapted(cls)
    x = torch.randn(5, 96)
    y = layer(x)
    with torch.no_grad():
        assert_bitwise_equal(layer(x), y.detach())
    with torch.inference_mode():
        assert_bitwise_equal(layer(x).clone(), y.detach())
