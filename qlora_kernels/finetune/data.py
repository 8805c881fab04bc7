"""Text to training windows: read documents, tokenize, cut into windows of seq_len + 1 tokens, split
into train and held-out, and serve batches as a pure function of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_kernels.errors import QLKError, argument_error
from qlora_kernels.files import tensor_bytes
from qlora_kernels.finetune.python_text import split_library_sources
from qlora_kernels.finetune.settings import Settings, derived_seed

# From this many documents on, whole documents are held out; below, the tail of each.
DOCUMENTS_TO_SPLIT_BY = 20
HELD_OUT_SHARE = 10
# Evaluation reads at most this many windows, evenly spaced: enough to rank methods, and seconds.
EVALUATION_WINDOWS = 64


class Tokenizer(Protocol):
    """What `data` needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


class ByteTokenizer:
    """UTF-8 bytes; each document is closed by a zero byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace") + b"\0")


class PretrainedTokenizer:
    """A transformers tokenizer, without special tokens but for one end-of-sequence a document."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids if end is None else [*ids, end]


@dataclass(frozen=True)
class TokenWindows:
    """Training and evaluation windows, int32 [count, seq_len + 1] each."""

    train: Tensor
    held_out: Tensor

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Windows of one step, int64 [size, seq_len + 1]: each epoch is a fresh permutation."""
        rows = []
        for position in range(step * size, (step + 1) * size):
            epoch, index = divmod(position, len(self.train))
            rows.append(int(self._order(seed, epoch)[index]))
        return self.train[rows].long()

    def _order(self, seed: int, epoch: int) -> Tensor:
        cached = self.__dict__.get("_epoch_order")
        if cached is None or cached[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
            order = torch.randperm(len(self.train), generator=generator)
            cached = ((seed, epoch), order)
            self.__dict__["_epoch_order"] = cached
        return cached[1]

    def digest(self) -> str:
        """Identifies the tokens, to notice that a resumed run was given other text."""
        state = hashlib.sha256(str(tuple(self.train.shape)).encode())
        for part in (self.train, self.held_out):
            state.update(tensor_bytes(part))
        return state.hexdigest()


def load_windows(settings: Settings, tokenizer: Tokenizer) -> TokenWindows:
    """Windows of ``settings.data``, or of the running Python's library sources if there is none.

    Raises:
        ArgumentError: unreadable, malformed or empty data, or too little of it for one window.
    """
    if settings.data:
        documents = [text for path in settings.data for text in read_documents(Path(path))]
        if not documents:
            raise argument_error(
                "finetune", "--data", "text with at least one non-blank line", "nothing but blanks"
            )
        train, held_out = split_documents([tokenizer.encode(text) for text in documents])
    else:
        train_text, held_out_text = split_library_sources()
        train = [tokenizer.encode(text) for text in train_text]
        held_out = [tokenizer.encode(text) for text in held_out_text]
    length = settings.seq_len + 1
    evaluation = cut(held_out, length, "held-out")
    if len(evaluation) > EVALUATION_WINDOWS:
        evaluation = evaluation[torch.linspace(0, len(evaluation) - 1, EVALUATION_WINDOWS).long()]
    return TokenWindows(cut(train, length, "training"), evaluation)


def read_documents(path: Path) -> list[str]:
    """Documents of one file: a JSONL file's `text` fields (by suffix .jsonl), else the whole text.

    Raises ArgumentError naming the file, and the line where there is one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise argument_error(
            "finetune", "--data", "readable files", f"{path} ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise argument_error(
            "finetune", "--data", "UTF-8 text", f"{path} (byte {error.start} is not)"
        ) from error
    documents = parse_jsonl(path, text) if path.suffix == ".jsonl" else [text]
    return [document for document in documents if document.strip()]


def parse_jsonl(path: Path, text: str) -> Iterable[str]:
    """The `text` field of every non-blank line."""
    # Not str.splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise argument_error(
                "finetune", "--data", "one JSON object a line", f"{path}:{number} ({error.msg})"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise argument_error(
                "finetune", "--data", "JSON objects with a string `text`", f"{path}:{number}"
            )
        yield record["text"]


def split_documents(documents: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Hold out a tenth: documents chosen by the hash of their tokens when there are many, the last
    tenth of each when there are few."""
    train: list[list[int]] = []
    held_out: list[list[int]] = []
    if len(documents) >= DOCUMENTS_TO_SPLIT_BY:
        for tokens in documents:
            digest = hashlib.sha256(repr(tokens).encode()).digest()
            (held_out if digest[0] % HELD_OUT_SHARE == 0 else train).append(tokens)
    if not (train and held_out):
        ends = [len(tokens) - len(tokens) // HELD_OUT_SHARE for tokens in documents]
        train = [tokens[:end] for tokens, end in zip(documents, ends, strict=True)]
        held_out = [tokens[end:] for tokens, end in zip(documents, ends, strict=True)]
    return train, held_out


def cut(documents: Sequence[list[int]], length: int, part: str) -> Tensor:
    """Documents joined and cut into windows, int32 [count, length]; the short tail is dropped."""
    total = sum(map(len, documents))
    if total < length:
        raise argument_error(
            "finetune",
            "--data",
            f"at least {length} tokens of {part} text (--seq-len {length - 1} and one more)",
            total,
        )
    joined = torch.empty(total, dtype=torch.int32)
    start = 0
    for tokens in documents:
        joined[start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        start += len(tokens)
    return joined[: total // length * length].view(-1, length)


def check_vocabulary(windows: TokenWindows, vocab_size: int) -> None:
    """Raises QLKError where the tokenizer yields ids that the model has no embedding for."""
    largest = int(max(windows.train.max(), windows.held_out.max()))
    if largest >= vocab_size:
        raise QLKError(
            f"finetune: the tokenizer yields id {largest}, the model has {vocab_size} embeddings"
        )
