"""The embedded model is Llama, its file is what `make.py` writes, and it has learned something."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_kernels.finetune.base_model import WEIGHTS, make
from qlora_kernels.finetune.data import ByteTokenizer, load_windows
from qlora_kernels.finetune.load import load_base
from qlora_kernels.finetune.loop import next_token_loss
from qlora_kernels.finetune.model import ByteLlama, ByteLlamaConfig
from qlora_kernels.finetune.settings import Settings
from tests.finetune.running import documentation_once


def test_embedded_model_is_transformers_llama() -> None:
    transformers = pytest.importorskip("transformers", reason="the hf extra")
    config = ByteLlamaConfig()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
        )
    ).eval()
    weights = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    renamed = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in weights.items()
    }
    theirs.load_state_dict(renamed)
    ours = ByteLlama()
    ours.load_state_dict(weights)
    ids = torch.tensor([list(b"def main(arguments):\n    return 0\n" * 8)])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)


def test_too_many_positions_are_refused() -> None:
    model = ByteLlama(ByteLlamaConfig(num_layers=1, max_positions=8))
    with pytest.raises(ValueError, match="at most 8 positions, got 9"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_embedded_file_is_small_and_says_where_it_is_from() -> None:
    assert WEIGHTS.stat().st_size <= 8_000_000
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == vars(ByteLlamaConfig())
    assert {"steps", "train_loss_nats_per_byte", "python", "torch"} <= set(metadata)


def test_embedded_model_predicts_python_better_than_chance(tmp_path: Path) -> None:
    settings = Settings("full", tmp_path, seq_len=128, dtype="float32")
    windows = load_windows(settings, ByteTokenizer())
    with torch.no_grad():
        loss = next_token_loss(load_base(settings).model, windows.held_out[:8].long(), settings)
    assert loss < 0.5 * math.log(256)


@pytest.mark.slow
def test_make_trains_and_writes_the_same_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "documentation", documentation_once)
    for name in ("a", "b"):
        make.main(["--out", str(tmp_path / name), "--steps", "1"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found, shipped = load_file(tmp_path / "a"), load_file(WEIGHTS)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in shipped.items()
    }
    fresh = ByteLlama()
    fresh.reset_parameters(torch.Generator().manual_seed(make.SEED))
    moved = (found["lm_head.weight"].float() - fresh.lm_head.weight).abs().max()
    assert moved > 1e-6
