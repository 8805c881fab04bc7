"""torch's own machinery around a fine-tuned model: compile, export, checkpointing, optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_kernels as qlk
from tests.integrations.models import (
    in_4bit,
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
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(make("llama", num_hidden_layers=1), tmp_path_factory.mktemp("llama"))


def fine_tuned(path: str, kind: str = "ours", **options: Any) -> Any:
    torch.manual_seed(7)
    if kind == "ours":
        model = Auto.from_pretrained(path, quantization_config=qlk.QLoRAKernelsConfig())
    else:
        model = in_4bit(path)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    qlk.accelerate(wrapped, verbose=False)
    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "bitsandbytes"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_whole_model_compiles_without_a_break(llama: str, kind: str, dropout: float) -> None:
    """One graph for every batch shape once the sizes are dynamic."""
    from torch._dynamo.testing import CompileCounter

    model = fine_tuned(llama, kind, lora_dropout=dropout).train(dropout > 0)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for batch, length in ((2, 12), (3, 7), (5, 20)):
        ids = tokens(batch, length)
        torch.manual_seed(0)
        got, gradients = loss_and_gradients(compiled, ids)
        torch.manual_seed(0)
        wanted, eager = loss_and_gradients(model, ids)
        assert torch.equal(got, wanted)
        assert (
            worst_error({k.replace("_orig_mod.", ""): v for k, v in gradients.items()}, eager)
            < 1e-6
        )
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_forward_and_backward(llama: str) -> None:
    """The whole model through AOTAutograd; three layers of it to code, which takes seconds each."""
    model = fine_tuned(llama)
    ids = tokens()
    wanted, eager = loss_and_gradients(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    got, gradients = loss_and_gradients(compiled, ids)
    assert relative_error(got, wanted) < 1e-5
    assert worst_error({k.replace("_orig_mod.", ""): v for k, v in gradients.items()}, eager) < 1e-4

    block, x = model.base_model.model.model.layers[0].mlp, torch.randn(3, 5, 64)
    found = []
    for run in (block, torch.compile(block, fullgraph=True)):
        model.zero_grad()
        given = x.clone().requires_grad_()
        run(given).square().sum().backward()
        named = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
        assert len(named) == 6
        found.append({**named, "x": given.grad})
    assert worst_error(found[1], found[0]) < 1e-5
    torch._dynamo.reset()


def test_forward_is_exported(llama: str, tmp_path: Path) -> None:
    model = fine_tuned(llama).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

    ids = tokens()
    with torch.no_grad():
        program = torch.export.export(Logits(), (ids,))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        assert torch.equal(loaded.module()(ids), model(input_ids=ids).logits)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("qlora_kernels.qlora_linear" in target for target in targets)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_and_autocast(llama: str, reentrant: bool, autocast: bool) -> None:
    """With dropout: the recomputation draws the same masks."""
    model = fine_tuned(llama, lora_dropout=0.2).train()
    model.enable_input_require_grads()
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(3)
        wanted, plain = loss_and_gradients(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        got, gradients = loss_and_gradients(model, ids)
    assert torch.equal(got, wanted)
    assert worst_error(gradients, plain) == 0.0
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def optimizers() -> dict[str, Any]:
    bnb = pytest.importorskip("bitsandbytes", reason="in the bnb extra")
    return {
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        "8bit": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2),
        "32bit": lambda p: bnb.optim.AdamW32bit(p, lr=1e-2),
    }


@pytest.mark.parametrize("name", ["fused", "foreach", "8bit", "32bit"])
def test_optimizers_train_the_adapters(llama: str, name: str) -> None:
    """Paged ones need CUDA's managed memory; on the CPU bitsandbytes refuses them itself."""
    make_optimizer = optimizers()[name]
    losses = {}
    for kind, maker in (("plain", lambda p: torch.optim.AdamW(p, lr=1e-2)), (name, make_optimizer)):
        model = fine_tuned(llama)
        frozen = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
        optimizer = maker([p for p in model.parameters() if p.requires_grad])
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
        losses[kind] = float(loss)
        now = model.state_dict()
        assert all(torch.equal(now[key], frozen[key]) for key in frozen)
    # 8-bit states are coarse, and small tensors keep 32 bits.
    assert losses[name] == pytest.approx(losses["plain"], rel=0.05 if name == "8bit" else 1e-3)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchaos_optimizers_take_the_adapters(llama: str, name: str) -> None:
    """Its steps uncompiled: the code for each shape takes seconds, and is torch's."""
    optim = pytest.importorskip("torchao.optim", reason="in the bench extra")
    losses = {}
    for kind, maker in (("plain", torch.optim.AdamW), (name, getattr(optim, name))):
        # 4096 values and more have few bits; these adapters have them at rank 64.
        model = fine_tuned(llama, r=64, target_modules=["gate_proj", "up_proj"])
        optimizer = maker([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with torch.compiler.set_stance("force_eager"):
            for _ in range(6):
                optimizer.zero_grad()
                loss = model(input_ids=tokens(), labels=tokens()).loss
                loss.backward()
                optimizer.step()
        losses[kind] = float(loss)
        small = [type(s["exp_avg"]) is not torch.Tensor for s in optimizer.state.values()]
        assert any(small) == (kind != "plain")
    assert losses[name] == pytest.approx(losses["plain"], rel=0.1)
