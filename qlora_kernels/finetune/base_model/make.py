"""Train the embedded base model on the running Python's documentation and write it as bf16.

    python -m qlora_kernels.finetune.base_model.make [--out FILE] [--steps N]

About 25 minutes on two cores with bf16 instructions, 50 without. The same Python and the same
machine give the same file; another Python has slightly different documentation.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from qlora_kernels.files import save_tensors
from qlora_kernels.finetune.base_model import WEIGHTS
from qlora_kernels.finetune.model import ByteLlama
from qlora_kernels.finetune.python_text import documentation
from qlora_kernels.finetune.schedule import learning_rate_factor

SEED = 0
BATCH = 32
SEQ_LEN = 256
PEAK_LR = 2e-3
WARMUP_STEPS = 100


def training_bytes() -> Tensor:
    """All documents as one uint8 vector, each closed by a zero byte (`data.ByteTokenizer`)."""
    text = b"".join(document.encode() + b"\0" for document in documentation())
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def train(steps: int) -> tuple[ByteLlama, float]:
    """Train from scratch; returns the model and the mean loss of the last tenth, in nats a byte."""
    generator = torch.Generator().manual_seed(SEED)
    model = ByteLlama()
    model.reset_parameters(generator)
    text = training_bytes()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
    )
    losses = []
    progress = tqdm(range(steps), unit="step", mininterval=5)
    for step in progress:
        lr = PEAK_LR * learning_rate_factor(step, steps, "cosine", WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(text) - SEQ_LEN, (BATCH, 1), generator=generator)
        windows = text[starts + torch.arange(SEQ_LEN + 1)].long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    tail = losses[-max(1, steps // 10) :]
    return model, sum(tail) / len(tail)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the embedded base model.")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=1400)
    options = parser.parse_args(arguments)
    model, final_loss = train(options.steps)
    metadata = {
        "config": json.dumps(vars(model.config)),
        "steps": str(options.steps),
        "train_loss_nats_per_byte": f"{final_loss:.4f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_tensors(options.out, weights, metadata)


if __name__ == "__main__":
    main()
