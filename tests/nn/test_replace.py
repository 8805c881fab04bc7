"""replace_linear: what it converts, what it leaves alone, and what it holds meanwhile."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.errors import ArgumentError, ArgumentTypeError
from qlora_kernels.nn import replace_linear


class Tiny(nn.Module):
    """An attention block's names, a tied head, and a layer held twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.attention = nn.ModuleDict(
            {"q_proj": nn.Linear(32, 32, bias=False), "k_proj": nn.Linear(32, 16)}
        )
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.mixer = nn.MultiheadAttention(32, 2)
        self.again = self.mlp[0]
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        self.lm_head = nn.Linear(32, 50)


def test_every_linear_that_can_be_is_replaced_and_the_others_are_named() -> None:
    model = Tiny()
    report = replace_linear(model, rank=4)
    assert set(report.replaced) == {
        "attention.q_proj",
        "attention.k_proj",
        "mlp.0",
        "mlp.2",
        "again",
    }
    assert set(report.replaced.values()) == {"QLoRALinear"}
    assert "embed and head" in report.skipped["head"]
    assert report.skipped["lm_head"] == "named in skip"
    assert "NonDynamicallyQuantizableLinear" in report.skipped["mixer.out_proj"]
    assert model.again is model.mlp[0]
    assert model.head.weight is model.embed.weight
    text = str(report)
    assert "5 linear layers replaced, 3 skipped" in text and "lm_head: skipped" in text


def test_what_a_model_keeps_in_fp32_is_left_alone() -> None:
    """T5 casts what it gives `wo` to the dtype of wo's weight."""
    model = nn.Module()
    model.block = Tiny()
    model.block._keep_in_fp32_modules = {"k_proj"}
    report = replace_linear(model, rank=4)
    assert "keeps it in fp32" in report.skipped["block.attention.k_proj"]
    assert "block.attention.q_proj" in report.replaced
    report = replace_linear(model, rank=4, quantize=False)
    assert report.replaced == {"block.attention.k_proj": "LoRALinear"}


def test_plain_lora_keeps_the_very_weights() -> None:
    model = Tiny()
    weight = model.mlp[0].weight
    replace_linear(model, rank=4, quantize=False, dropout=0.25, rslora=True)
    layer = model.mlp[0]
    assert type(layer) is qlk.LoRALinear and layer.weight.data_ptr() == weight.data_ptr()
    assert layer.dropout_p == 0.25 and layer.rslora


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (("q_proj", "mlp.2"), {"attention.q_proj", "mlp.2"}),
        (r".*\.(q|k)_proj", {"attention.q_proj", "attention.k_proj"}),
        (["proj"], set()),
        ("proj", set()),
    ],
)
def test_targets(target: Any, expected: set[str]) -> None:
    if not expected:
        with pytest.raises(ArgumentError, match="target must be matched by a linear layer"):
            replace_linear(Tiny(), rank=4, target=target)
        return
    assert set(replace_linear(Tiny(), rank=4, target=target).replaced) == expected


def test_a_rank_that_one_layer_cannot_have_changes_nothing() -> None:
    model = Tiny()
    with pytest.raises(ArgumentError, match=r"attention\.k_proj: rank must be .* 1 … 16"):
        replace_linear(model, rank=17)
    assert type(model.attention["q_proj"]) is nn.Linear


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ArgumentError, match="model must be a module that holds"):
        replace_linear(nn.Linear(4, 4))
    with pytest.raises(ArgumentTypeError, match=r"model must be an nn\.Module"):
        replace_linear([nn.Linear(4, 4)])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="a model without linear layers"):
        replace_linear(nn.Sequential(nn.GELU()))


def test_a_second_call_leaves_adapters_alone() -> None:
    model = Tiny()
    replace_linear(model, rank=4, target=["q_proj"])
    report = replace_linear(model, rank=4)
    assert report.skipped["attention.q_proj"] == "already a QLoRALinear"
    assert "mlp.0" in report.replaced


def test_quantized_layers_get_an_adapter_over_the_same_bytes() -> None:
    model = nn.Sequential(qlk.QuantizedLinear.from_linear(nn.Linear(32, 32), format="fp4"))
    codes = model[0].weight.data_ptr()
    replace_linear(model, rank=4, format="nf4")
    assert type(model[0]) is qlk.QLoRALinear
    assert model[0].format.name == "fp4" and model[0].weight.data_ptr() == codes


def test_one_dense_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is quantized, the dense weights before it are gone."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    dense = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    from qlora_kernels.nn import quantized_linear

    quantize = quantized_linear.quantize

    def counting(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(weight() is not None for weight in dense))
        return quantize(*arguments, **options)

    monkeypatch.setattr(quantized_linear, "quantize", counting)
    replace_linear(model, rank=4)
    assert alive == [6, 5, 4, 3, 2, 1]
    assert not any(weight() is not None for weight in dense)
