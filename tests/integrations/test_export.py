"""merge_to_16bit: dequantized weight plus adapter, once rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from tests.integrations.models import in_4bit, make, relative_error, saved, tokens, transformers

peft = pytest.importorskip("peft", reason="in the hf extra")
Auto = transformers.AutoModelForCausalLM


def adapted(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(7)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def ours(path: str) -> Any:
    config = qlk.QLoRAKernelsConfig(embeddings=True)
    return Auto.from_pretrained(path, quantization_config=config)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("kind", ["ours", "bitsandbytes", "dense"])
def test_peft_models(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = saved(make("llama"), tmp_path)
    load = {"ours": ours, "bitsandbytes": in_4bit, "dense": Auto.from_pretrained}[kind]
    model = adapted(load(path), **options)
    ids = tokens()
    wanted = model(input_ids=ids).logits
    dense = qlk.merge_to_16bit(model, torch.float32)
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    assert relative_error(dense(ids).logits, wanted) < 2e-5
    dense.save_pretrained(tmp_path / "merged")
    plain = Auto.from_pretrained(tmp_path / "merged")
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(plain(ids).logits, dense(ids).logits)


def test_weights_are_rounded_once(tmp_path: Path) -> None:
    model = adapted(ours(saved(make("llama"), tmp_path)))
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    weight = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")
    dense = qlk.merge_to_16bit(model)
    got = dense.model.layers[1].mlp.up_proj.weight
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, weight.bfloat16())


def test_own_layers_and_experts(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    qlk.replace_linear(model, rank=4)
    for parameter in qlk.lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 64)
    wanted = model(x)
    dense = qlk.merge_to_16bit(model, torch.float32)
    assert [type(module) for module in dense] == [nn.Linear, nn.ReLU, nn.Linear]
    assert relative_error(dense(x), wanted) < 1e-5
    mixture = ours(saved(make("mixtral"), tmp_path))
    logits = mixture(tokens()).logits
    assert (
        relative_error(qlk.merge_to_16bit(mixture, torch.float32)(tokens()).logits, logits) < 1e-5
    )


@pytest.mark.parametrize("kind", ["ours", "bitsandbytes"])
def test_gpt2_gets_its_own_layers_back(kind: str, tmp_path: Path) -> None:
    path = saved(make("gpt2"), tmp_path)
    model = adapted({"ours": ours, "bitsandbytes": in_4bit}[kind](path))
    ids = tokens()
    if kind == "bitsandbytes":
        qlk.accelerate(model, verbose=False)
    wanted = model(input_ids=ids).logits
    dense = qlk.merge_to_16bit(model, torch.float32)
    dense.save_pretrained(tmp_path / "merged")
    plain, info = Auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert type(plain.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert relative_error(plain(ids).logits, wanted) < 2e-5


def test_what_is_refused() -> None:
    with pytest.raises(qlk.errors.ArgumentTypeError, match=r"model must be an nn\.Module"):
        qlk.merge_to_16bit({})
