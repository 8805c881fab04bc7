"""Device memory that launches reuse: Ŵ for the dense path, tickets for split sums.

A buffer belongs to one thread and one stream, whose launches run one after another. While a CUDA
graph is captured every buffer is a new one: the graph's memory must not be used by anything else.
"""

from __future__ import annotations

import threading

import torch

from qlora_kernels.backends.cuda.common import current_stream

_buffers = threading.local()


def _kept(name: str, numel: int, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    make = like.new_zeros if name == "tickets" else like.new_empty
    if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make(numel, dtype=dtype)
    stream = current_stream(like) if like.device.type == "cuda" else 0
    key = (name, dtype, like.device, stream)
    buffers: dict[tuple[object, ...], torch.Tensor] = _buffers.__dict__.setdefault("buffers", {})
    if key not in buffers or buffers[key].numel() < numel:
        buffers[key] = make(numel, dtype=dtype)
    return buffers[key]


def dense_scratch(rows: int, cols: int, like: torch.Tensor) -> torch.Tensor:
    """[rows, cols] of like's dtype and device, contents undefined, valid until the next call."""
    return _kept("dense", rows * cols, like.dtype, like)[: rows * cols].view(rows, cols)


def tickets(count: int, like: torch.Tensor) -> torch.Tensor:
    """At least `count` int32 zeros; a launch that uses them leaves zeros behind."""
    return _kept("tickets", max(count, 1024), torch.int32, like)
