"""Mixtures of experts and embeddings in 4 bits, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

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
    with pytest.raises(qlk.errors.ArgumentError, match="embeddings must be dense to be resized"):
        again.resize_token_embeddings(100)
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
    back.resize_token_embeddings(back.config.vocab_size)
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


@pytest.mark.parametrize("targets", [[], EXPERTS])
def test_compiles_and_exports_whole(mixtral: str, targets: list[str]) -> None:
    """How many tokens an expert gets is data, and no graph breaks on it."""
    model = adapted(quantized(mixtral), target_parameters=targets or None)
    ids = tokens()
    wanted, gradients = loss_and_gradients(model, ids)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    got, ours = loss_and_gradients(compiled, ids)
    assert counter.frame_count == 1
    assert torch.equal(got, wanted)
    assert worst_error({n.removeprefix("_orig_mod."): g for n, g in ours.items()}, gradients) == 0.0
    if targets:
        return

    class Logits(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    dims = {"ids": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=60)}}
    module = Logits()
    module.model = model.eval()
    with torch.no_grad():
        program = torch.export.export(module, (ids,), dynamic_shapes=dims)
        again = tokens(3, 9)
        assert torch.equal(program.module()(again), model(input_ids=again).logits)


def test_ops_are_what_their_fakes_say(mixtral: str) -> None:
    weight = experts_of(quantized(mixtral))[0].operands("down_proj")
    counts, ops = torch.tensor([2, 0, 3, 1, 1]), torch.ops.qlora_kernels
    x, grad_y = torch.randn(7, 96), torch.randn(7, 64)
    a, b = torch.randn(4, 3, 96), torch.randn(4, 64, 3)
    torch.library.opcheck(ops.experts_matmul, (x, counts, *weight))
    torch.library.opcheck(ops.experts_matmul_backward_input, (grad_y, counts, *weight))
    torch.library.opcheck(ops.experts_qlora_linear, (x, counts, *weight, a, b, 2.0))
    saved = (grad_y, x, torch.randn(7, 3), counts)
    for needs in ([True, True, True], [False, True, False]):
        backward = ops.experts_qlora_linear_backward
        torch.library.opcheck(backward, (*saved, *weight, a, b, 2.0, needs))


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


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_experts_that_are_stored_transposed(name: str, tmp_path: Path) -> None:
    """GPT-OSS's have biases too; Llama 4's get every token, scaled beforehand."""
    path = saved(make(name), tmp_path)
    model = quantized(path).eval()
    assert len(experts_of(model)) == 2 and not model.hf_quantizer.left
    assert not [n for n, p in model.named_parameters() if p.dim() == 3 and p.is_floating_point()]
    block = "mlp" if name == "gpt_oss" else "feed_forward"
    dense = getattr(Auto.from_pretrained(path).model.layers[1], block).experts
    for projection in ("gate_up_proj", "down_proj"):
        got = experts_of(model)[1].dequantize(projection)
        for expert, weight in enumerate(getattr(dense, projection)):
            assert torch.equal(got[expert], qlk.dequantize(qlk.quantize(weight.t())))
    model.save_pretrained(tmp_path / "one")
    again, info = Auto.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    twin = adapted(quantized(path).dequantize(), target_parameters=EXPERTS)
    model = adapted(model, target_parameters=EXPERTS)
    ids = tokens(3, 17)
    wanted, gradients = loss_and_gradients(twin, ids)
    got, ours = loss_and_gradients(model, ids)
    assert sum("experts" in key for key in gradients) == 8
    assert relative_error(got, wanted) < 2e-5
    assert worst_error(ours, gradients) < 1e-4
    alone = model(input_ids=ids).logits.detach()
    model.merge_adapter()
    twin.merge_adapter()
    stock = next(m for m in twin.modules() if type(m).__name__ == type(dense).__name__)
    for projection in ("gate_up_proj", "down_proj"):
        merged = experts_of(model)[0].dequantize(projection)
        for expert, weight in enumerate(getattr(stock, projection).data):
            assert torch.equal(merged[expert], qlk.dequantize(qlk.quantize(weight.t())))
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=ids).logits, alone)
    merged = qlk.merge_to_16bit(model, torch.float32)
    assert relative_error(merged(ids).logits.detach(), alone) < 2e-5


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_adapters_of_transposed_experts_travel(name: str, tmp_path: Path) -> None:
    """This library's own over either order of dimensions, PEFT's over quantized and over dense."""
    path = saved(make(name), tmp_path)
    own = quantized(path)
    ids = tokens(3, 17)
    torch.manual_seed(5)
    qlk.replace_linear(own, rank=4, target=["q_proj", *EXPERTS])
    with torch.no_grad():
        for parameter in qlk.lora_parameters(own):
            parameter.normal_(std=0.1)
    qlk.save_adapter(own, tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(
        quantized(path).dequantize(), tmp_path / "ours", is_trainable=True
    )
    # A training step, which is the same one: files in either layout, gradients in it too.
    wanted, _ = loss_and_gradients(twin, ids)
    got, _ = loss_and_gradients(own, ids)
    assert relative_error(got, wanted) < 2e-5
    both = (*twin.parameters(), *qlk.lora_parameters(own))
    trained = [parameter for parameter in both if parameter.grad is not None]
    with torch.no_grad():
        for parameter in trained:
            parameter -= 0.1 * parameter.grad
    assert relative_error(own(ids).logits.detach(), wanted) > 1e-4
    wanted = twin(input_ids=ids).logits.detach()
    assert relative_error(own(ids).logits.detach(), wanted) < 2e-5
    twin.save_pretrained(tmp_path / "theirs")
    again = quantized(path)
    qlk.load_adapter(again, tmp_path / "theirs")
    qlk.save_adapter(again, tmp_path / "back")
    one, two = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "back")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    fused = peft.PeftModel.from_pretrained(quantized(path), tmp_path / "back")
    for model in (again, fused):
        assert relative_error(model(input_ids=ids).logits.detach(), wanted) < 2e-5


def test_what_peft_refuses_over_experts_is_refused(mixtral: str) -> None:
    """It has no dropout there, nor DoRA, whatever the experts are stored in."""
    for options, words in (
        ({"lora_dropout": 0.1}, "does not work with lora_dropout != 0"),
        ({"use_dora": True}, "does not work with use_dora=True"),
    ):
        for model in (quantized(mixtral), Auto.from_pretrained(mixtral)):
            with pytest.raises(ValueError, match=words):
                adapted(model, target_parameters=EXPERTS, **options)


def test_experts_that_are_not_known_are_named(
    mixtral: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(Auto.from_pretrained(mixtral).model.layers[0].mlp.experts)
    build = kind.__init__

    def with_norms(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.has_post_expert_norm = True

    monkeypatch.setattr(kind, "__init__", with_norms)
    model = quantized(mixtral)
    assert not experts_of(model) and len(model.hf_quantizer.left) == 2
    assert caplog.text.count("its experts have norms") == 1
    assert "model.layers.0.mlp.experts, model.layers.1.mlp.experts" in caplog.text


def test_own_adapters_are_those_of_peft(mixtral: str, tmp_path: Path) -> None:
    """Adapters of `replace_linear`: PEFT loads them, they load PEFT's, and a merge has them."""
    torch.manual_seed(5)
    model = quantized(mixtral)
    report = qlk.replace_linear(model, rank=4, skip=("lm_head", "v_proj"))
    assert list(report.replaced.values()).count("ExpertAdapter") == 4
    with torch.no_grad():
        for parameter in qlk.lora_parameters(model):
            parameter.normal_(std=0.1)
    qlk.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(quantized(mixtral), tmp_path / "ours")
    ids = tokens()
    with torch.no_grad():
        wanted = model(ids).logits
        assert relative_error(theirs(input_ids=ids).logits, wanted) < 1e-6
        theirs.save_pretrained(tmp_path / "theirs")
        again = quantized(mixtral)
        qlk.load_adapter(again, tmp_path / "theirs")
        assert torch.equal(again(ids).logits, wanted)
        merged = qlk.merge_to_16bit(again, torch.float32)
        assert relative_error(merged(ids).logits, wanted) < 2e-5
    assert not any("adapter" in name for name in merged.state_dict())
    (tmp_path / "ours" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "theirs" / "adapter_model.safetensors").read_bytes()
    )
    qlk.replace_linear(other := quantized(mixtral), rank=2, target=["experts.down_proj"])
    qlk.load_adapter(other, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(other(ids).logits, wanted)
    wider = {"rank": 4, "target": ["v_proj", "experts.down_proj"]}
    qlk.replace_linear(other := quantized(mixtral), **wider)
    with pytest.raises(qlk.errors.CheckpointError, match="v_proj"):
        qlk.load_adapter(other, tmp_path / "ours")


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
