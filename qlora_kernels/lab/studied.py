"""A dense model whose layers are quantized in place, with text to run it on and a figure of how far
its output has moved: what `lab sensitivity` and `lab init` work on.

`embedded` is fine-tuning's own small language model, `minilm` a sentence encoder, anything else a
causal language model that transformers loads. A language model's figure is the divergence of its
next-token distributions from the dense model's, KL in nats per token; an encoder's the mean of
1 − cosine over its sentences' embeddings. Both are 0 for the dense model and, for small errors of
several layers at once, about the sum of what each alone would give.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kernels.errors import argument_error
from qlora_kernels.finetune.data import check_vocabulary, load_windows
from qlora_kernels.finetune.load import load_base, load_tokenizer
from qlora_kernels.finetune.loop import next_token_loss
from qlora_kernels.finetune.settings import Settings
from qlora_kernels.lab.cache import tensor_digest
from qlora_kernels.lab.encoder import SentenceEncoder
from qlora_kernels.lab.weights import EXCLUDED, MINILM, minilm_folder

EMBEDDED = "embedded"


class StudiedModel:
    """What the two kinds have in common.

    Attributes:
        model: dense, in evaluation mode; its layers' weights are what is written to.
        layers: the linear layers that may be quantized, by name.
        unit: of `error`.
    """

    unit: str

    def __init__(self, model: nn.Module, chosen: str) -> None:
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        try:
            pattern, excluded = re.compile(chosen), re.compile(EXCLUDED)
        except re.error as error:
            raise argument_error("lab", "--layers", "a regular expression", chosen) from error
        self.layers: dict[str, nn.Linear] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not excluded.search(name) and pattern.search(name)
        }
        if not self.layers:
            raise argument_error("lab", "--layers", "found in a linear layer's name", chosen)

    def run(self, part: str) -> None:
        """Run the model on its calibration text ("calibration") or on other text ("held-out")."""
        raise AssertionError("a model of one of the two kinds")

    def error(self) -> float:
        """How far the output on the held-out text has moved, in `unit`."""
        raise AssertionError("a model of one of the two kinds")

    def loss(self) -> float | None:
        """The held-out loss in nats per token, of a language model."""
        return None

    def texts(self) -> Sequence[Tensor]:
        """The tokens it runs on."""
        raise AssertionError("a model of one of the two kinds")

    def digest(self) -> str:
        """Identifies weights and text."""
        state = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            state.update(f"{name} {tensor_digest(tensor)}".encode())
        for tokens in self.texts():
            state.update(tensor_digest(tokens).encode())
        return state.hexdigest()

    @contextmanager
    def weights(self, replaced: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, some layers have other weights."""
        kept = {name: self.layers[name].weight.detach().clone() for name in replaced}
        try:
            for name, weight in replaced.items():
                self.layers[name].weight.data.copy_(weight)
            yield
        finally:
            for name, weight in kept.items():
                self.layers[name].weight.data.copy_(weight)


class LanguageModel(StudiedModel):
    """The embedded model, or one that transformers loads, on windows of text."""

    unit = "KL, nats per token"

    def __init__(self, settings: Settings, count: int, chosen: str) -> None:
        tokenizer = load_tokenizer(settings)
        windows = load_windows(settings, tokenizer)
        base = load_base(settings)
        check_vocabulary(windows, base.vocab_size)
        super().__init__(base.model, chosen)
        self.settings = settings
        self.parts = {
            "calibration": windows.batch(settings.seed, 0, count),
            "held-out": windows.held_out[:count].long(),
        }
        self.dense = [logits.log_softmax(-1) for logits in self.logits("held-out")]

    def texts(self) -> Sequence[Tensor]:
        return list(self.parts.values())

    @torch.no_grad()
    def logits(self, part: str) -> Iterator[Tensor]:
        """fp32 logits [positions, vocabulary] of each window."""
        for window in self.parts[part]:
            output = self.model(window[None, :-1])
            yield (output if isinstance(output, Tensor) else output.logits)[0].float()

    def run(self, part: str) -> None:
        for _ in self.logits(part):
            pass

    def error(self) -> float:
        total = tokens = 0.0
        for dense, logits in zip(self.dense, self.logits("held-out"), strict=True):
            now = logits.log_softmax(-1)
            # In fp64: near 0 the terms of a divergence cancel to first order.
            total += float(F.kl_div(now.double(), dense.double(), reduction="sum", log_target=True))
            tokens += len(now)
        return total / tokens

    @torch.no_grad()
    def loss(self) -> float:
        parts = [
            float(next_token_loss(self.model, window[None], self.settings))
            for window in self.parts["held-out"]
        ]
        return sum(parts) / len(parts)


class EncoderModel(StudiedModel):
    """A sentence encoder: even sentences calibrate it, odd ones are held out."""

    unit = "1 - cosine"

    def __init__(self, folder: Path, count: int, chosen: str) -> None:
        self.encoder = SentenceEncoder(folder, 2 * count)
        super().__init__(self.encoder.model, chosen)

    def texts(self) -> Sequence[Tensor]:
        return [self.encoder.inputs["input_ids"]]

    def run(self, part: str) -> None:
        self.encoder.embed(slice(int(part == "held-out"), None, 2))

    def error(self) -> float:
        return float(1 - self.encoder.cosines(slice(1, None, 2)).mean())


def studied_model(
    name: str, data: Sequence[str], count: int, chosen: str, seq_len: int, seed: int
) -> StudiedModel:
    """The model of that name.

    Args:
        name: embedded, minilm, or a folder or hub id.
        data: text files for a language model; none takes fine-tuning's default text.
        count: windows, or sentences, to calibrate on, and as many others to measure on.
        chosen: a regular expression that is found in the layers' names.
        seq_len: tokens a window.
        seed: of the choice of windows.

    Raises:
        ArgumentError: data for an encoder, no such layer, and as `finetune` does.
        QLKError: something to load it with is not installed.
    """
    if count < 1:
        raise argument_error("lab", "--texts", "at least 1", count)
    if name == MINILM:
        if data:
            raise argument_error("lab", "--data", "left out with minilm", ", ".join(data))
        return EncoderModel(minilm_folder(), count, chosen)
    settings = Settings(
        method="lora",  # which loads the dense model
        out=Path(),
        model=None if name == EMBEDDED else name,
        data=tuple(data),
        batch=1,
        seq_len=seq_len,
        seed=seed,
    )
    return LanguageModel(settings, count, chosen)
