"""plan: against the live bytes of a real step, and against what the shapes are known to hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels import cli
from qlora_kernels.finetune.optimizers import OPTIMIZERS as CHOICES
from qlora_kernels.integrations.experts import is_experts, make_quantized, projections_of
from qlora_kernels.integrations.plan import OPTIMIZERS, SHAPES, Plan, config_of, plan_memory
from qlora_kernels.testing.live_memory import LiveMemory
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


def measured_peak(
    shape: Any, checkpointing: bool, dropout: float, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that live through a step, and at its peak."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype)
    for module in model.modules():
        if is_experts(module):
            dense = {name: getattr(module, name) for name in projections_of(module)}
            make_quantized(module, qlk.get_format("nf4"), dtype)
            for name, stack in dense.items():
                module.hold(name, [qlk.quantize(matrix, "nf4") for matrix in stack])
    qlk.replace_linear(model.train(), rank=16, dropout=dropout)
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
@pytest.mark.parametrize(
    ("checkpointing", "dtype", "vocabulary", "dropout"),
    [  # every two of the choices together
        (False, torch.float32, 512, 0.0),
        (True, torch.float32, 4000, 0.1),
        (False, torch.bfloat16, 4000, 0.1),
        (True, torch.bfloat16, 512, 0.0),
    ],
)
def test_plan_is_within_a_tenth_of_a_real_step(
    checkpointing: bool, vocabulary: int, dropout: float, dtype: torch.dtype
) -> None:
    shape = config(vocabulary)
    plan = plan_memory(
        shape,
        batch=4,
        seq_len=64,
        rank=16,
        dropout=dropout,
        dtype=dtype,
        checkpointing=checkpointing,
    )
    lasting, peak = measured_peak(shape, checkpointing, dropout, dtype)
    planned = plan.codes + plan.scales + plan.dense + plan.adapters + plan.optimizer
    assert planned == pytest.approx(lasting, rel=0.01)
    assert plan.total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan_of_a_mixture_is_within_a_tenth_of_a_real_step(checkpointing: bool) -> None:
    """Experts are quantized and adapted; each is planned to get its share of the tokens."""
    shape = transformers.MixtralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    options = {"batch": 4, "seq_len": 64, "rank": 16, "dtype": torch.float32}
    plan = plan_memory(shape, checkpointing=checkpointing, **options)
    experts = 3 * 4 * 3 * 256 * 344
    assert plan.codes == (experts + 3 * 2 * 256 * (256 + 128)) // 2
    lasting, peak = measured_peak(shape, checkpointing, 0.0, torch.float32)
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
    assert str(Plan(2**19, 0, 0, 0, 0, 0, 0, 0)).startswith("codes            0.50 MiB")
    assert "0.00 MiB" not in out.split("total")[1]
    assert cli.main([*command, "--batch", "0"]) == 2
    assert "plan: batch must be at least 1, got 0" in capsys.readouterr().err
    transformers.T5Config().save_pretrained(tmp_path)
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: plan: MODEL must be a causal language model") and len(err) < 200


def test_table_beside_the_papers_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--table", "--seq-len", "64"]) == 0
    head, _, *rows = (line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines())
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert table.keys() == SHAPES.keys()

    def number(name: str, column: str) -> float:
        return float(table[name][column].strip("<> GB"))

    # Released sizes, in 1e9: 6.74, 13.02, 32.53, 65.29; Llama 3's are 8.03 and 70.55.
    for name, size in zip(SHAPES, (6.74, 13.02, 32.53, 65.29, 8.03, 70.55), strict=True):
        assert table[name]["parameters"] == f"{size:.2f}e9"
    for name in ("llama-7b", "llama-13b", "llama-33b", "llama-65b"):
        # The paper's program held up to half as much again beside the weights.
        assert 0.6 < number(name, "base, 4 bits") / number(name, "paper's model") < 1
    assert number("llama-65b", "full, 16 bits") == pytest.approx(780, rel=0.01)
    for name, gib in (("llama-33b", 24), ("llama-65b", 48)):
        assert number(name, "all of a step") < gib * 2**30 / 1e9
        assert table[name]["paper's card"] == f"< {gib} GB"
    assert cli.main(["plan"]) == 2


def test_finetune_plans_its_own_options(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shape = config(512)
    shape.save_pretrained(tmp_path)
    command = ["finetune", "--model", str(tmp_path), "--plan", "--rank", "8", "--seq-len", "64"]
    command += ["--batch", "2", "--dtype", "float32", "--optim", "paged-adamw-8bit"]
    assert cli.main([*command, "--card", "1"]) == 0
    wanted = plan_memory(
        shape,
        batch=2,
        seq_len=64,
        rank=8,
        dtype=torch.float32,
        checkpointing=False,
        optimizer="paged-adamw-8bit",
    )
    assert capsys.readouterr().out == f"{wanted}\nfits 1 GiB\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
    for wrong in (["--method", "lora"], ["--rank", "0"]):
        assert cli.main([*command, *wrong]) == 2
    assert cli.main(["finetune", "--plan"]) == 2
    assert "--model must be given with --plan" in capsys.readouterr().err
    # What one can ask of a run, one can plan.
    assert OPTIMIZERS.keys() >= CHOICES.keys()
