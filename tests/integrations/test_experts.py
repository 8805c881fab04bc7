"""Mixtures of experts and embeddings in 4 bits, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qlora_kernels as qlk
from qlora_kernels.nn import QuantizedExperts
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


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(make("mixtral", intermediate_size=96), tmp_path_factory.mktemp("mixtral"))


def quantized(path: str, **options: Any) -> Any:
    return Auto.from_pretrained(path, quantization_config=qlk.QLoRAKernelsConfig(**options))


def experts_of(model: Any) -> list[QuantizedExperts]:
    return [module for module in model.modules() if isinstance(module, QuantizedExperts)]


@pytest.mark.parametrize("format", qlk.list_formats())
@pytest.mark.parametrize("double_quant", [False, True])
def test_each_expert_is_quantized_by_itself(mixtral: str, format: str, double_quant: bool) -> None:
    model = quantized(mixtral, format=format, double_quant=double_quant)
    dense = Auto.from_pretrained(mixtral)
    assert len(experts_of(model)) == 2
    for layer, stock in zip(model.model.layers, dense.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            got = layer.mlp.experts.dequantize(name)
            for e, weight in enumerate(getattr(stock.mlp.experts, name)):
                wanted = qlk.quantize(weight, format, double_quant=double_quant)
                assert torch.equal(got[e], qlk.dequantize(wanted))


def test_saved_loaded_and_saved_again(mixtral: str, tmp_path: Path) -> None:
    model = quantized(mixtral, embeddings=True)
    logits = model(tokens()).logits
    model.save_pretrained(tmp_path / "one")
    again, info = Auto.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values())
    assert isinstance(again.model.embed_tokens, qlk.QuantizedEmbedding)
    assert torch.equal(again(tokens()).logits, logits)
    again.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    stored = sum(tensor.nbytes for key, tensor in one.items() if "experts" in key)
    plain = load_file(Path(mixtral) / "model.safetensors")
    dense = sum(tensor.nbytes for key, tensor in plain.items() if "experts" in key)
    assert stored < dense / 32 * 4.6
    back = again.dequantize()
    assert not experts_of(back)
    back.save_pretrained(tmp_path / "dense")
    assert torch.equal(
        Auto.from_pretrained(tmp_path / "dense")(tokens()).logits, back(tokens()).logits
    )


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(model: Any, seed: int = 2, **options: Any) -> Any:
    torch.manual_seed(seed)
    chosen = {"r": 4, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**chosen))


@pytest.mark.parametrize("targets", [[], EXPERTS])
def test_training_step_equals_the_dense_model(mixtral: str, targets: list[str]) -> None:
    options = {"target_parameters": targets or None, "target_modules": ["q_proj", "o_proj"]}
    model = adapted(quantized(mixtral), **options)
    twin = adapted(quantized(mixtral).dequantize(), **options)
    ids = tokens(3, 17)
    wanted, gradients = loss_and_gradients(twin, ids)
    got, ours = loss_and_gradients(model, ids)
    assert sum("experts" in name for name in gradients) == 4 * len(targets)
    assert relative_error(got, wanted) < 2e-5
    assert worst_error(ours, gradients) < 1e-4
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    again, checkpointed = loss_and_gradients(model, ids)
    assert torch.equal(again, got)
    assert worst_error(checkpointed, ours) == 0.0


def test_adapters_of_experts_travel_merge_and_come_in_numbers(mixtral: str, tmp_path: Path) -> None:
    model = adapted(quantized(mixtral), target_parameters=EXPERTS)
    torch.manual_seed(4)
    other = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=EXPERTS, init_lora_weights=False
    )
    model.add_adapter("other", other)
    ids = tokens()
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        model.base_model.set_adapter(["default", "other"])
        both = model(input_ids=ids).logits
        model.set_adapter("default")
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, quantized(mixtral)(ids).logits)
        model.save_pretrained(tmp_path)
        twin = quantized(mixtral).dequantize()
        twin = peft.PeftModel.from_pretrained(twin, tmp_path)
        assert relative_error(twin(input_ids=ids).logits, alone) < 2e-5
        twin.load_adapter(tmp_path / "other", "other")
        twin.base_model.set_adapter(["default", "other"])
        assert relative_error(twin(input_ids=ids).logits, both) < 2e-5
        back = peft.PeftModel.from_pretrained(quantized(mixtral), tmp_path)
        assert torch.equal(back(input_ids=ids).logits, alone)
        back.merge_adapter()
        assert relative_error(back(input_ids=ids).logits, alone) > 1e-3
        back.unmerge_adapter()
        assert torch.equal(back(input_ids=ids).logits, alone)
        report = qlk.accelerate(back, verbose=False)
        assert sum("experts" in name for name in report.fused) == 2 and not report.fallback
        dense = qlk.merge_to_16bit(back, torch.float32)
        assert relative_error(dense(ids).logits, alone) < 2e-5


def test_tokens_without_an_expert_and_gradients_of_the_router(mixtral: str) -> None:
    """Expert parallelism marks a slot that is not here by the index num_experts."""
    experts = experts_of(quantized(mixtral))[0]
    torch.manual_seed(3)
    x = torch.randn(7, 64, requires_grad=True)
    weights = torch.rand(7, 2, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 4], [4, 4], [3, 3], [2, 0], [0, 2], [1, 0]])
    y = experts(x, index, weights)
    y.square().sum().backward()
    grads = (x.grad.clone(), weights.grad.clone())
    gate_up, down = experts.dequantize("gate_up_proj"), experts.dequantize("down_proj")
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weights))
    wanted = torch.zeros(7, 64, dtype=torch.float64)
    for t in range(7):
        for k in range(2):
            e = int(index[t, k])
            if e < 4:
                gate, up = (gate_up[e].double() @ x64[t]).chunk(2)
                h = down[e].double() @ (torch.nn.functional.silu(gate) * up)
                wanted = wanted.index_add(0, torch.tensor([t]), (w64[t, k] * h)[None])
    wanted.square().sum().backward()
    assert relative_error(y, wanted) < 1e-6
    assert relative_error(grads[0], x64.grad) < 1e-6
    assert relative_error(grads[1], w64.grad) < 1e-6


def test_experts_may_stay_dense(mixtral: str) -> None:
    for options in ({"experts": False}, {"skip": ["experts"]}, {"checkpoint": "bitsandbytes"}):
        model = quantized(mixtral, **options)
        assert not experts_of(model)
        assert isinstance(model.model.layers[0].self_attn.q_proj, qlk.QuantizedLinear)


def test_tied_embeddings_stay_dense(tmp_path: Path) -> None:
    path = saved(make("llama", tie_word_embeddings=True), tmp_path)
    model = quantized(path, embeddings=True)
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(qlk.errors.ArgumentError, match="embeddings must be False"):
        qlk.QLoRAKernelsConfig(embeddings=True, checkpoint="bitsandbytes")
