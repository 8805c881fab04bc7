"""PEFT's tuners other than LoRA over quantized layers: as over the dense layers of their values."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_kernels as qlk
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
LAYERS = ["q_proj", "down_proj"]
# Some take the base's product, some read its weight, when they are made or in every forward.
TUNERS: dict[str, dict[str, Any]] = {
    "AdaLora": {"total_step": 10},
    "BOFT": {},
    "HRA": {},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LoHa": {},
    "LoKr": {},
    "Miss": {},
    "OFT": {},
    "Shira": {},
    "Vera": {"target_modules": ["q_proj", "o_proj"]},  # of one shape
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(make("llama"), tmp_path_factory.mktemp("llama"))


def quantized(path: str) -> Any:
    return Auto.from_pretrained(path, quantization_config=qlk.QLoRAKernelsConfig())


def tuned(name: str, model: Any, adapter: str = "default") -> Any:
    """A model with a tuner of which nothing is zero."""
    config = getattr(peft, f"{name}Config")(**{"target_modules": LAYERS, **TUNERS[name]})
    torch.manual_seed(2)
    model = peft.get_peft_model(model, config, adapter)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def layers(model: Any) -> list[Any]:
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", TUNERS)
def test_forward_backward_and_merges(name: str, llama: str, tmp_path: Path) -> None:
    model, twin = tuned(name, quantized(llama)), tuned(name, quantized(llama).dequantize())
    ids = tokens()
    wanted, gradients = loss_and_gradients(twin, ids)
    got, ours = loss_and_gradients(model, ids)
    assert relative_error(got, wanted) < 2e-6
    assert worst_error(ours, gradients) < 1e-4
    assert all(type(layer.get_base_layer()) is qlk.QuantizedLinear for layer in layers(model))
    model.save_pretrained(tmp_path)
    for again in (
        peft.PeftModel.from_pretrained(quantized(llama), tmp_path).eval(),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(again(input_ids=ids).logits, got)
    kept = [layer.get_base_layer().quantized_weight.codes.clone() for layer in layers(model)]
    # Directly, which asks nobody whether it is allowed.
    for layer, other in zip(layers(model), layers(twin), strict=True):
        layer.merge()
        other.merge()
        merged = qlk.dequantize(qlk.quantize(other.get_base_layer().weight.data))
        assert relative_error(layer.get_base_layer().dequantize(), merged) < 1e-3
    merged = model(input_ids=ids).logits
    assert relative_error(merged, got) > 1e-3
    for layer, codes in zip(layers(model), kept, strict=True):
        layer.unmerge()
        assert torch.equal(layer.get_base_layer().quantized_weight.codes, codes)
    assert torch.equal(model(input_ids=ids).logits, got)
    if name == "IA3":
        with pytest.raises(ValueError, match="Cannot merge ia3"):  # PEFT does not try in 4 bits
            model.merge_and_unload()
        return
    plain = model.merge_and_unload()
    assert isinstance(plain.model.layers[0].self_attn.q_proj, qlk.QuantizedLinear)
    assert torch.equal(plain(ids).logits, merged)


def test_a_second_adapter(llama: str) -> None:
    """It is made where the first one is already."""
    model = tuned("LoHa", quantized(llama))
    first = model(input_ids=tokens()).logits
    torch.manual_seed(5)
    model.add_adapter("other", peft.LoHaConfig(target_modules=LAYERS, init_weights=False))
    model.set_adapter("other")
    assert relative_error(model(input_ids=tokens()).logits, first) > 1e-3
    model.set_adapter("default")
    assert torch.equal(model(input_ids=tokens()).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens()).logits, quantized(llama)(tokens()).logits)


def test_a_bias_is_merged_and_comes_back(tmp_path: Path) -> None:
    """OFT and IA3 scale what the base puts out, its bias too."""
    path = saved(make("qwen2"), tmp_path)
    model = tuned("IA3", quantized(path))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.bias.data.normal_()
    x, bias = torch.randn(3, 64), layer.base_layer.bias.clone()
    wanted = layer(x)
    layer.merge()
    assert not torch.equal(layer.base_layer.bias, bias)
    assert relative_error(layer(x), wanted) < 0.1
    layer.unmerge()
    assert torch.equal(layer.base_layer.bias, bias) and torch.equal(layer(x), wanted)


def test_a_tuner_that_copies_layers_is_refused(llama: str) -> None:
    with pytest.raises(qlk.errors.ArgumentError, match="target_modules must be of dense layers"):
        peft.get_peft_model(quantized(llama), peft.LNTuningConfig(target_modules=LAYERS))
    model = peft.get_peft_model(
        quantized(llama), peft.LNTuningConfig(target_modules=["input_layernorm"])
    )
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_lora_over_a_quantized_embedding(llama: str) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    )
    models = []
    for dense in (False, True):
        how = qlk.QLoRAKernelsConfig(embeddings=True)
        model = Auto.from_pretrained(llama, quantization_config=how)
        torch.manual_seed(2)
        models.append(peft.get_peft_model(model.dequantize() if dense else model, config))
    model, twin = models
    wanted, gradients = loss_and_gradients(twin, tokens())
    got, ours = loss_and_gradients(model, tokens())
    assert relative_error(got, wanted) < 2e-6 and worst_error(ours, gradients) < 1e-4
    layer, other = (m.base_model.model.model.embed_tokens for m in models)
    codes = layer.base_layer.quantized_weight.codes.clone()
    layer.merge()
    other.merge()
    merged = qlk.quantize(other.base_layer.weight.data)
    assert torch.equal(layer.base_layer.quantized_weight.codes, merged.codes)
    layer.unmerge()
    assert torch.equal(layer.base_layer.quantized_weight.codes, codes)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=tokens()).logits, got)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters must be of dense layers or"),
        ({"init_lora_weights": "olora"}, "init_lora_weights must be .*initialize_adapters"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must be .*initialize_adapters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices must be of dense layers"),
    ],
)
def test_what_takes_bytes_for_the_weight_is_refused(
    options: dict[str, Any], words: str, llama: str
) -> None:
    how = qlk.QLoRAKernelsConfig(embeddings=True)
    model = Auto.from_pretrained(llama, quantization_config=how)
    with pytest.raises(qlk.errors.ArgumentError, match=words):
        peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["k_proj"], **options}))
