"""plan: against the live bytes of a real step, and against what the shapes are known to hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels import cli
from qlora_kernels.integrations.plan import SHAPES, Plan, config_of, plan_memory
from tests.integrations.live_memory import LiveMemory
from tests.integrations.models import transformers


def config(vocabulary: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )


def measured_peak(shape: Any, checkpointing: bool, dropout: float) -> tuple[int, int]:
    """Bytes that live through a step, and at its peak."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32).train()
    qlk.replace_linear(model, rank=16, dropout=dropout)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(list(qlk.lora_parameters(model)), foreach=False)
    ids = torch.randint(0, shape.vocab_size, (4, 64))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [
        t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    ]
    memory = LiveMemory(*model.parameters(), *model.buffers(), *states)
    lasting = memory.now
    with memory:
        step()
    return lasting, memory.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("vocabulary", "dropout"), [(512, 0.0), (4000, 0.1)])
def test_plan_is_within_a_tenth_of_a_real_step(
    checkpointing: bool, vocabulary: int, dropout: float
) -> None:
    shape = config(vocabulary)
    plan = plan_memory(
        shape,
        batch=4,
        seq_len=64,
        rank=16,
        dropout=dropout,
        dtype=torch.float32,
        checkpointing=checkpointing,
    )
    lasting, peak = measured_peak(shape, checkpointing, dropout)
    planned = plan.codes + plan.scales + plan.dense + plan.adapters + plan.optimizer
    assert planned == pytest.approx(lasting, rel=0.01)
    assert plan.total == pytest.approx(peak, rel=0.1)


def test_known_sizes() -> None:
    """LLaMA 7B has 6,476,005,376 weights in its 224 linear layers."""
    seven = plan_memory(config_of("llama-7b"), seq_len=64)
    assert seven.codes * 2 == 6_476_005_376
    assert seven.scales / seven.codes == pytest.approx(0.127 / 4, rel=0.01)
    assert seven.adapters == 4 * 64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert seven.optimizer == 2 * seven.adapters and seven.gradients == seven.adapters
    longer = plan_memory(config_of("llama-7b"), seq_len=256)
    assert longer.activations == pytest.approx(4 * seven.activations, rel=0.1)
    assert set(SHAPES) >= {"llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama-3-70b"}


def test_options_count() -> None:
    shape = config(512)
    plain = plan_memory(shape, seq_len=64)
    assert plan_memory(shape, seq_len=64, double_quant=False).scales > 3 * plain.scales
    assert plan_memory(shape, seq_len=64, optimizer="adamw-8bit").optimizer < plain.optimizer / 3
    assert plan_memory(shape, seq_len=64, checkpointing=False).activations > plain.activations
    with pytest.raises(qlk.errors.ArgumentError, match="optimizer must be one of"):
        plan_memory(shape, optimizer="lion")


def test_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config(512).save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--seq-len", "64", "--rank", "8"]
    assert cli.main([*command, "--card", "1"]) == 0
    out = capsys.readouterr().out
    assert "total" in out and "fits 1 GiB" in out
    assert cli.main([*command, "--card", "0.001"]) == 1
    assert "does not fit 0.001 GiB" in capsys.readouterr().out
    assert str(Plan(2**30, 0, 0, 0, 0, 0, 0, 0)).startswith("codes            1.00 GiB")
