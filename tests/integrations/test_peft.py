"""PEFT over quantized layers of this library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.integrations.fused import Fused
from qlora_kernels.integrations.peft import patch_peft, unpatch_peft
from tests.integrations.models import (
    loss_and_gradients,
    make,
    relative_error,
    saved,
    tokens,
    transformers,
    worst_error,
)

peft = pytest.importorskip("peft", reason="in the hf extra")

Auto = transformers.AutoModelForCausalLM
FP32_BOUND = 2e-5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(make("llama", intermediate_size=160), tmp_path_factory.mktemp("llama"))


def quantized(path: str, **options: Any) -> Any:
    return Auto.from_pretrained(path, quantization_config=qlk.QLoRAKernelsConfig(**options))


def adapted(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(7)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def dense_twin(path: str, **options: Any) -> Any:
    """Stock PEFT, over the dense model of the same weights."""
    return adapted(quantized(path).dequantize(), **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 64}},
    "saved modules": {"modules_to_save": ["lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "names": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_training_step_equals_stock_peft_on_the_dense_model(llama: str, option: str) -> None:
    options = OPTIONS[option]
    model, twin = adapted(quantized(llama), **options), dense_twin(llama, **options)
    count = sum(isinstance(module, Fused) for module in model.modules())
    assert count == (2 if option == "names" else 14)
    # The dense twin has trainable weights where nothing was adapted, unless PEFT froze them.
    ids = tokens()
    twin.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k or "modules_to_save" in k},
        strict=False,
    )
    wanted, gradients = loss_and_gradients(twin, ids)
    got, ours = loss_and_gradients(model, ids)
    assert relative_error(got, wanted) < FP32_BOUND
    assert worst_error(ours, gradients) < FP32_BOUND


def test_adapters_travel_both_ways(llama: str, tmp_path: Path) -> None:
    ids = tokens()
    model = adapted(quantized(llama))
    wanted = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "ours")
    stock = peft.PeftModel.from_pretrained(quantized(llama).dequantize(), tmp_path / "ours")
    assert relative_error(stock(input_ids=ids).logits, wanted) < FP32_BOUND
    stock.save_pretrained(tmp_path / "stock")
    back = peft.PeftModel.from_pretrained(quantized(llama), tmp_path / "stock")
    assert torch.equal(back(input_ids=ids).logits, wanted)
    # And into this library's own layers.
    own = quantized(llama)
    qlk.load_adapter(own, tmp_path / "stock")
    assert torch.equal(own(input_ids=ids).logits, wanted)


def test_several_adapters(llama: str) -> None:
    model = adapted(quantized(llama))
    torch.manual_seed(3)
    model.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    twin = dense_twin(llama)
    twin.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    twin.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False
    )
    ids = tokens()
    seen = []
    with torch.no_grad():
        for names in ("default", "other", ["default", "other"]):
            for each in (model, twin):
                each.base_model.set_adapter(names)
            got, wanted = model(input_ids=ids).logits, twin(input_ids=ids).logits
            assert relative_error(got, wanted) < FP32_BOUND
            seen.append(got)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, quantized(llama)(ids).logits)
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("format", ["nf4", "int4"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_requantizes_and_unmerge_is_exact(llama: str, format: str, safe: bool) -> None:
    model = adapted(quantized(llama, format=format))
    ids = tokens()
    before = model(input_ids=ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    dense = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")
    model.merge_adapter(safe_merge=safe)
    merged = qlk.quantize(dense.detach(), format)
    assert torch.equal(layer.base_layer.quantized_weight.codes, merged.codes)
    assert torch.equal(layer.base_layer.dequantize(), qlk.dequantize(merged))
    assert relative_error(model(input_ids=ids).logits, before) > 1e-3
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=ids).logits, before)
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], state[name]) for name in state)


def test_merge_of_two_adapters_and_of_a_broken_one(llama: str) -> None:
    model = adapted(quantized(llama))
    model.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    ids = tokens()
    before = model(input_ids=ids).logits
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=ids).logits, before)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.lora_B["default"].weight.data[0, 0] = math.nan
    with pytest.raises(qlk.errors.ArgumentError, match="finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_merge_and_unload_gives_back_quantized_layers(llama: str) -> None:
    model = adapted(quantized(llama))
    ids = tokens()
    model.merge_adapter()
    merged = model(input_ids=ids).logits
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert not any(isinstance(module, Fused) for module in plain.modules())
    assert torch.equal(plain(ids).logits, merged)


def test_what_would_change_stored_bytes_is_refused_beforehand(llama: str) -> None:
    """PEFT would multiply the packed codes of one layer after another, in layers of its own."""
    model = quantized(llama)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    unpatch_peft()
    try:
        tuned = peft.get_peft_model(model, peft.IA3Config(**targets))
    finally:
        patch_peft()
    with pytest.raises(qlk.errors.ArgumentError, match=r"the adapter of .*k_proj must be over"):
        tuned.merge_adapter()
    now = {name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(now[name], stored[name]) for name in stored)
    model = quantized(llama)
    with pytest.raises(qlk.errors.ArgumentError, match="modules_to_save must be of dense layers"):
        adapted(model, target_modules=["q_proj"], modules_to_save=["k_proj"])


def test_dora_runs_and_merges(llama: str) -> None:
    model, twin = adapted(quantized(llama), use_dora=True), dense_twin(llama, use_dora=True)
    twin.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False
    )
    ids = tokens()
    wanted, gradients = loss_and_gradients(twin, ids)
    got, ours = loss_and_gradients(model, ids)
    assert relative_error(got, wanted) < FP32_BOUND
    assert worst_error(ours, gradients) < FP32_BOUND
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=ids).logits.detach(), got)


def test_loraplus_sees_the_names(llama: str) -> None:
    from peft.optimizers import create_loraplus_optimizer

    model = adapted(quantized(llama))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = sorted({group["lr"] for group in optimizer.param_groups if group["params"]})
    assert rates == [1e-3, 1.6e-2]
    before = model(input_ids=tokens(), labels=tokens()).loss
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert model(input_ids=tokens(), labels=tokens()).loss < before


def test_without_the_patch_peft_runs_its_own_forward_until_accelerated() -> None:
    torch.manual_seed(4)
    layer = qlk.QuantizedLinear.from_linear(nn.Linear(96, 40))
    options = {"r": 4, "target_modules": ["0"], "init_lora_weights": False}
    unpatch_peft()
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(**options))
    assert not any(isinstance(module, Fused) for module in model.modules())
    x = torch.randn(3, 96)
    stock = model(x)
    report = qlk.accelerate(model, verbose=False)
    assert report.fused == {"base_model.model.0": "Linear"}
    assert relative_error(model(x), stock) < 1e-6
    patch_peft()
    again = peft.get_peft_model(
        nn.Sequential(qlk.QuantizedLinear.from_linear(nn.Linear(8, 8))), peft.LoraConfig(**options)
    )
    assert sum(isinstance(module, Fused) for module in again.modules()) == 1
    dense = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(**options))
    assert not any(isinstance(module, Fused) for module in dense.modules())


@pytest.mark.slow
def test_kbit_preparation_and_trainer_with_resume(llama: str, tmp_path: Path) -> None:
    """Gradient checkpointing, save, resume: the interrupted run ends where the whole one does."""
    data = [{"input_ids": row, "labels": row} for row in tokens(16, 12, seed=5)]

    def train(folder: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        model = peft.prepare_model_for_kbit_training(quantized(llama))
        assert model.is_gradient_checkpointing
        model = adapted(model, lora_dropout=0.1)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_steps=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}

    whole = train("whole", 6)
    train("parts", 3)
    resumed = train("parts", 6, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
