"""Results that survive: one line a cell in one file, appended when the cell is done.

A cell's key is the hash of everything its value depends on: the tensors' bytes, the format's
definition, the measurement's options, and the code that computes it. A line is one `write` to a
file opened for appending, with a checksum: a process killed at any moment loses the cell it was
computing, and a line that was cut short is not read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.backends import library
from qlora_kernels.errors import QLKError

CELLS = "cells.jsonl"
# Folders of the package whose code decides what a cell holds.
CODE = ("formats", "reference", "backends", "ops", "autograd", "nn", "finetune", "lab")


class CellCache:
    """The cells in one folder, all in memory: a cell is a few hundred bytes.

    Raises:
        QLKError: the folder cannot be made, or the file in it not be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CELLS
        self.cells: dict[str, dict[str, Any]] = {}
        self.computed = 0
        self.reused = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Reading too: whether the last line was cut short shows in its last byte.
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            content = self.path.read_bytes()
            if content and not content.endswith(b"\n"):
                os.write(self.handle, b"\n")
        except OSError as error:
            raise QLKError(f"lab: cannot use the cache {self.path} ({error.strerror})") from error
        for line in content.split(b"\n"):
            cell = parse_line(line)
            if cell is not None:
                self.cells[cell[0]] = cell[1]

    def __enter__(self) -> CellCache:
        return self

    def __exit__(self, *ended: object) -> None:
        os.close(self.handle)

    def get(self, key: str) -> dict[str, Any] | None:
        """The cell of that key, or None."""
        found = self.cells.get(key)
        self.reused += found is not None
        return found

    def put(self, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """Store a cell and return it as a later `get` would.

        Raises QLKError where it cannot be written.
        """
        line = make_line(key, value)
        try:
            written = os.write(self.handle, line)
        except OSError as error:
            raise QLKError(f"lab: cannot write {self.path} ({error.strerror})") from error
        if written != len(line):
            raise QLKError(f"lab: cannot write {self.path} (no space left)")
        self.computed += 1
        self.cells[key] = json.loads(json.dumps(value))
        return self.cells[key]

    def cell(self, key: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The cell of that key, computed and stored if there is none."""
        found = self.get(key)
        return self.put(key, compute()) if found is None else found


def make_line(key: str, value: Mapping[str, Any]) -> bytes:
    """`key value checksum`, the value as JSON; ValueError for one that is not finite."""
    body = f"{key} {json.dumps(value, allow_nan=False)}"
    return f"{body} {zlib.crc32(body.encode()):08x}\n".encode()


def parse_line(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """Key and value, or None for a line that is not whole."""
    body, _, checksum = line.rpartition(b" ")
    if checksum != f"{zlib.crc32(body):08x}".encode():
        return None
    key, _, value = body.decode().partition(" ")
    return key, dict(json.loads(value))


def cell_key(kind: str, **parts: object) -> str:
    """The key of a cell; ``parts`` is what JSON holds."""
    text = json.dumps([kind, code_digest(), parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        held: Any = flat.view(torch.uint8).numpy()  # a buffer; numpy's annotations do not say so
        state.update(held)
    return state.hexdigest()


@functools.cache
def code_digest() -> str:
    """Identifies the code that computes cells: sources and the compiled library."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(path for folder in CODE for path in (package / folder).rglob("*.py"))
    state = hashlib.sha256()
    for path in [*files, library.load().path]:
        state.update(path.name.encode())
        if path.exists():
            state.update(path.read_bytes())
    return state.hexdigest()
