"""Text to windows: documents, the split, and batches that are a function of the step alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_kernels.errors import ArgumentError
from qlora_kernels.finetune.data import (
    EVALUATION_WINDOWS,
    ByteTokenizer,
    TokenWindows,
    cut,
    load_windows,
    read_documents,
    split_documents,
)
from qlora_kernels.finetune.python_text import (
    docstrings,
    is_held_out,
    library_sources,
    split_library_sources,
)
from qlora_kernels.finetune.settings import Settings
from tests.finetune.running import documentation_once


def test_byte_tokenizer_is_the_bytes() -> None:
    assert ByteTokenizer().encode("añ\ud800") == [97, 0xC3, 0xB1, ord("?"), 0]


def test_jsonl_keeps_unusual_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two"}\n\n{"text": " "}\n{"text": "three"}', "utf-8")
    assert read_documents(path) == ["one\u2028two", "three"]


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    assert read_documents(path) == ["one\n\ntwo"]


def test_few_documents_give_their_tails() -> None:
    train, held_out = split_documents([list(range(100)), list(range(50))])
    assert train == [list(range(90)), list(range(45))]
    assert held_out == [list(range(90, 100)), list(range(45, 50))]


def test_many_documents_are_held_out_whole_whatever_their_order() -> None:
    documents = [[n, n + 1, n + 2] for n in range(200)]
    train, held_out = split_documents(documents)
    assert sorted(train + held_out) == documents
    assert 5 < len(held_out) < 40
    assert sorted(split_documents(documents[::-1])[1]) == sorted(held_out)


def test_windows_cover_the_text_in_order() -> None:
    windows = cut([[1, 2, 3], [4, 5], [6, 7, 8]], 3, "training")
    assert windows.tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ArgumentError, match="at least 9 tokens of training text"):
        cut([[1, 2, 3], [4, 5], [6, 7, 8]], 9, "training")


def test_an_epoch_visits_every_window_once() -> None:
    train = torch.arange(10, dtype=torch.int32)[:, None].expand(10, 2)
    windows = TokenWindows(train, train)
    visited = [windows.batch(seed=0, step=step, size=3)[:, 0] for step in range(10)]
    order = torch.cat(visited)
    assert order.dtype == torch.int64
    first, second, third = order.split(10)
    for epoch in (first, second, third):
        assert sorted(epoch.tolist()) == list(range(10))
    assert first.tolist() != second.tolist() != third.tolist()


def test_batches_depend_on_the_step_alone() -> None:
    train = torch.arange(50, dtype=torch.int32)[:, None].expand(50, 2)
    forwards, backwards = TokenWindows(train, train), TokenWindows(train, train)
    expected = [forwards.batch(7, step, 4) for step in range(30)]
    found = [backwards.batch(7, step, 4) for step in reversed(range(30))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(forwards.batch(8, 0, 4), expected[0])


def test_digest_tells_texts_apart() -> None:
    a = torch.zeros(4, 3, dtype=torch.int32)
    b = a.clone()
    b[3, 2] = 1
    digests = {TokenWindows(x, y).digest() for x in (a, b) for y in (a, b)}
    assert len(digests) == 4
    assert TokenWindows(a, b).digest() == TokenWindows(a.clone(), b.clone()).digest()
    assert TokenWindows(a.view(3, 4), a).digest() != TokenWindows(a, a).digest()


def test_default_text_is_the_library_and_its_split_is_fixed(tmp_path: Path) -> None:
    windows = load_windows(Settings("lora", tmp_path), ByteTokenizer())
    assert windows.held_out.shape == (EVALUATION_WINDOWS, 257)
    assert len(windows.train) > 10_000
    train, held_out = split_library_sources()
    sources = library_sources()
    assert len(train) + len(held_out) == len(sources)
    assert set(held_out) == {sources[name] for name in sources if is_held_out(name)}
    assert 0.05 < len(held_out) / len(sources) < 0.2
    assert not any("site-packages" in name or name.startswith("test/") for name in sources)


def test_base_model_never_saw_what_is_held_out() -> None:
    """Some long lines stand in several modules; a third are docstrings of the held-out ones."""
    sources = library_sources()
    held_out = [source for name, source in sources.items() if is_held_out(name)]
    lines = {line.strip() for source in held_out for line in source.splitlines()}
    lines = {line for line in lines if len(line) > 60}
    seen = {line.strip() for text in documentation_once() for line in text.splitlines()}
    leaked = {
        line.strip()
        for source in held_out
        for text in docstrings(source)
        for line in text.splitlines()
    }
    assert len(lines & leaked) > 0.2 * len(lines)
    assert len(lines & seen) < 0.03 * len(lines)
