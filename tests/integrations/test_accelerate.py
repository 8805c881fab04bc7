"""accelerate: the same numbers from the fused path, and the layer's own forward elsewhere."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.integrations.bitsandbytes import quantized_weight_of
from qlora_kernels.integrations.fused import Fused
from tests.integrations.models import (
    in_4bit,
    loss_and_gradients,
    make,
    relative_error,
    saved,
    tokens,
    worst_error,
)

peft = pytest.importorskip("peft", reason="in the hf extra")
bnb = pytest.importorskip("bitsandbytes", reason="in the bnb extra")

# Sums of fp32 in another order, through two layers and their backward.
FP32_BOUND = 2e-5


def adapted(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(7)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(make("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def quantized(llama: str) -> Any:
    return adapted(in_4bit(llama))


def test_quantized_model_computes_the_same(quantized: Any) -> None:
    ids = tokens()
    wanted, gradients = loss_and_gradients(quantized, ids)
    state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    report = qlk.accelerate(quantized, verbose=False)
    assert len(report.fused) == 14 and not report.fallback
    assert report.untouched == {"base_model.model.lm_head": "a dense layer without an adapter"}
    got, fused_gradients = loss_and_gradients(quantized, ids)
    assert not torch.equal(got, wanted)  # another order of summation: it did run elsewhere
    assert relative_error(got, wanted) < FP32_BOUND
    assert worst_error(fused_gradients, gradients) < FP32_BOUND
    now = quantized.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "t5", "bert"])
def test_dense_bases_compute_the_same(name: str) -> None:
    """GPT-2's Conv1D holds its weight transposed; Qwen2 and BERT have biases."""
    model = adapted(make(name), bias="all" if name == "qwen2" else "none")
    ids = tokens()

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if name != "bert":
            return loss_and_gradients(model, ids)
        model.zero_grad()
        out = model(input_ids=ids).last_hidden_state
        out.square().mean().backward()
        named = model.named_parameters()
        return out.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}

    wanted, gradients = step()
    report = qlk.accelerate(model, verbose=False)
    assert report.fused and not report.fallback
    got, fused_gradients = step()
    assert relative_error(got, wanted) < FP32_BOUND
    assert worst_error(fused_gradients, gradients) < 10 * FP32_BOUND
    assert qlk.deaccelerate(model) == len(report.fused)
    again, _ = step()
    assert torch.equal(again, wanted)


def test_linear4bit_alone_and_its_subclasses() -> None:
    torch.manual_seed(8)
    for cls, quant_type in ((bnb.nn.LinearNF4, "nf4"), (bnb.nn.LinearFP4, "fp4")):
        layer = cls(96, 40, compute_dtype=torch.float32).to("cpu")
        model = nn.Sequential(layer)
        report = qlk.accelerate(model, verbose=False)
        assert report.fused == {"0": cls.__name__}
        assert type(layer).__name__ == cls.__name__ and isinstance(layer, cls)
        dense = qlk.dequantize(quantized_weight_of(layer.weight, layer.weight.quant_state))
        assert layer.weight.quant_state.quant_type == quant_type
        x = torch.randn(3, 96)
        y = model(x)
        wanted = (x.double() @ dense.double().T + layer.bias.double()).detach()
        assert relative_error(y, wanted) < 1e-6


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_dtypes_are_the_layers_own(compute: torch.dtype | None, given: torch.dtype) -> None:
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=compute).to("cpu")
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(9)).to(given)
    stock = copy.deepcopy(layer)(x)
    qlk.accelerate(nn.Sequential(layer), verbose=False)
    y = layer(x)
    assert y.dtype == stock.dtype == given
    coarse = torch.bfloat16 in (compute, given)
    assert relative_error(y, stock) < (1e-2 if coarse else 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == given


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_autocast_is_no_worse_than_stock(quantized: Any, adapters: torch.dtype) -> None:
    ids = tokens()
    for name, parameter in quantized.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().to(adapters)
    exact = copy.deepcopy(quantized).float()
    truth, _ = loss_and_gradients(exact, ids)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = loss_and_gradients(quantized, ids)
        qlk.accelerate(quantized, verbose=False)
        got, gradients = loss_and_gradients(quantized, ids)
    assert got.dtype == wanted.dtype
    assert {gradient.dtype for gradient in gradients.values()} == {adapters}
    assert relative_error(got, truth) <= 1.2 * relative_error(wanted, truth)


FEATURES: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 64}},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "saved modules": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_stay_fused(llama: str, feature: str) -> None:
    model = adapted(in_4bit(llama), **FEATURES[feature])
    ids = tokens()
    wanted, gradients = loss_and_gradients(model, ids)
    report = qlk.accelerate(model, verbose=False)
    assert report.fused and not report.fallback
    got, fused_gradients = loss_and_gradients(model, ids)
    assert relative_error(got, wanted) < FP32_BOUND
    assert worst_error(fused_gradients, gradients) < FP32_BOUND


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "bias"),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "ALora"),
    ],
)
def test_other_variants_run_their_own_forward(
    llama: str, options: dict[str, Any], reason: str
) -> None:
    model = adapted(in_4bit(llama), **options)
    ids = tokens()
    wanted = model(input_ids=ids).logits
    report = qlk.accelerate(model, verbose=False)
    lora = {name: why for name, why in report.fallback.items() if name.endswith("q_proj")}
    assert len(lora) == 2 and all(reason in why for why in lora.values())
    assert reason in str(report)
    # Their base layers are fused all the same.
    assert relative_error(model(input_ids=ids).logits, wanted) < FP32_BOUND


@pytest.mark.parametrize("name", ["llama 4bit", "llama", "gpt2", "qwen2"])
def test_dora_is_fused_without_dropout(name: str, llama: str) -> None:
    model = adapted(in_4bit(llama) if "4bit" in name else make(name), use_dora=True)
    for key, parameter in model.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1.3  # where it starts, DoRA is LoRA
    ids = tokens()
    wanted, gradients = loss_and_gradients(model, ids)
    assert any("magnitude" in key for key in gradients)
    report = qlk.accelerate(model, verbose=False)
    assert report.fused and not report.fallback
    for _ in range(2):  # and with the row norms that were kept
        got, fused_gradients = loss_and_gradients(model, ids)
        assert relative_error(got, wanted) < FP32_BOUND
        assert worst_error(fused_gradients, gradients) < 5 * FP32_BOUND


def test_dora_with_dropout_and_after_a_merge(llama: str) -> None:
    model = adapted(in_4bit(llama), use_dora=True, lora_dropout=0.5).train()
    report = qlk.accelerate(model, verbose=False)
    assert set(report.fallback.values()) == {"DoRA with dropout"}
    ids = tokens()
    model.eval()
    report = qlk.accelerate(model, verbose=False)
    assert not report.fallback
    before = model(input_ids=ids).logits
    model.merge_adapter()
    merged = model(input_ids=ids).logits
    model.unmerge_adapter()
    assert relative_error(merged, before) > 1e-3
    assert torch.equal(model(input_ids=ids).logits, before)
    # Other bytes in the same parameter: the norms that were kept do not survive them.
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight.zero_()
    x = torch.randn(2, 64, requires_grad=True)  # or stock layers round it to bf16: see in_4bit
    got = layer(x)
    qlk.deaccelerate(model)
    assert relative_error(got, layer(x)) < FP32_BOUND


def test_several_disabled_and_mixed_adapters(quantized: Any) -> None:
    torch.manual_seed(10)
    quantized.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    ids = tokens()
    names = ["default", "other"]

    def outputs() -> list[torch.Tensor]:
        found = []
        with torch.no_grad():
            for name in names:
                quantized.set_adapter(name)
                found.append(quantized(input_ids=ids).logits)
            quantized.base_model.set_adapter(names)
            found.append(quantized(input_ids=ids).logits)
            with quantized.disable_adapter():
                found.append(quantized(input_ids=ids).logits)
            quantized.eval()
            for module in quantized.modules():
                if isinstance(module, bnb.nn.Linear4bit) and not hasattr(module, "base_layer"):
                    module.train()  # see in_4bit
            mixed = ["default", "__base__"]
            found.append(quantized(input_ids=ids, adapter_names=mixed).logits)
            quantized.set_adapter("default")
        return found

    wanted = outputs()
    assert all(relative_error(a, b) > 1e-3 for a, b in itertools.pairwise(wanted))
    qlk.accelerate(quantized, verbose=False)
    for got, stock in zip(outputs(), wanted, strict=True):
        assert relative_error(got, stock) < FP32_BOUND
    quantized.base_model.set_adapter(names)
    report = qlk.accelerate(quantized, verbose=False)
    assert set(report.fallback.values()) == {"2 active adapters"}


def test_hooks_inside_a_layer_still_run(quantized: Any) -> None:
    layer = quantized.base_model.model.model.layers[0].self_attn.q_proj
    qlk.accelerate(quantized, verbose=False)
    seen: list[str] = []
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append("A"))
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    quantized(input_ids=tokens())
    assert seen == ["A", "layer"]
    report = qlk.accelerate(quantized, verbose=False)
    assert list(report.fallback.values()) == ["its A layer has hooks"]


def test_dropout_masks_the_adapter_only() -> None:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(64, 32))
    options = {"r": 4, "target_modules": ["0"], "lora_dropout": 0.5, "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    qlk.accelerate(wrapped, verbose=False)
    layer = wrapped.base_model.model[0]
    x = torch.randn(512, 64)
    with torch.no_grad():
        base = layer.base_layer(x)
        full = wrapped.eval()(x) - base
        wrapped.train()
        torch.manual_seed(1)
        first = wrapped(x) - base
        torch.manual_seed(1)
        assert torch.equal(wrapped(x) - base, first)
        mean = torch.stack([wrapped(x) - base for _ in range(200)]).mean(dim=0)
    assert relative_error(first, full) > 0.3
    # The mean of 200 draws is within 200^-0.5 of one draw's spread.
    assert relative_error(mean, full) < 0.15


@pytest.mark.parametrize("name", ["llama 4bit", "gpt2", "llama"])
def test_merging_is_undone_exactly(name: str, llama: str) -> None:
    model = adapted(in_4bit(llama) if "4bit" in name else make(name))
    qlk.accelerate(model, verbose=False)
    ids = tokens()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = model(input_ids=ids).logits
    model.merge_adapter()
    merged = model(input_ids=ids).logits
    model.unmerge_adapter()
    after = model(input_ids=ids).logits
    if "4bit" in name:
        assert relative_error(merged, before) > 1e-3  # it was quantized again
        assert torch.equal(after, before)
        now = model.state_dict()
        assert all(torch.equal(now[key], state[key]) for key in state)
    else:
        assert relative_error(merged, before) < FP32_BOUND
        assert relative_error(after, before) < FP32_BOUND


def test_copies_pickles_and_files(quantized: Any, tmp_path: Path) -> None:
    qlk.accelerate(quantized, verbose=False)
    ids = tokens()
    wanted = quantized(input_ids=ids).logits
    twin = copy.deepcopy(quantized)
    assert sum(isinstance(module, Fused) for module in twin.modules()) == 28
    assert torch.equal(twin(input_ids=ids).logits, wanted)
    buffer = io.BytesIO()
    layer = quantized.base_model.model.model.layers[0].mlp.up_proj
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(3, 64)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))
    quantized.save_pretrained(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(quantized.unload(), tmp_path / "adapter")
    report = qlk.accelerate(plain, verbose=False)
    assert len(report.fused) == 14
    assert torch.equal(plain(input_ids=ids).logits, wanted)


def test_gradient_checkpointing(quantized: Any) -> None:
    ids = tokens()
    qlk.accelerate(quantized, verbose=False)
    wanted, gradients = loss_and_gradients(quantized, ids)
    for reentrant in (False, True):
        quantized.train()
        quantized.enable_input_require_grads()
        quantized.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got, again = loss_and_gradients(quantized, ids)
        assert torch.equal(got, wanted)
        assert worst_error(again, gradients) == 0.0


def test_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    report = qlk.accelerate(model)
    assert str(report) in capsys.readouterr().err
    assert "0 layers fused" in str(report) and "0: a dense layer without an adapter" in str(report)
    qlk.accelerate(model, verbose=False)
    assert capsys.readouterr().err == ""


def test_unquantized_and_foreign_layers_are_reported() -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64), nn.Linear(4, 4))
    report = qlk.accelerate(model, verbose=False)
    assert report.fallback == {"0": "its weight is not quantized yet"}
    assert report.untouched["1"] == "a Linear8bitLt"
    with pytest.raises(qlk.errors.ArgumentTypeError, match="accelerate: model must be"):
        qlk.accelerate("model")
