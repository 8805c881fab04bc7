"""A dense weight that a forward leaves for the backward of the same call, where it was requested.

The autograd Functions save it with their tensors, so that it lives and dies with them, and torch's
check of saved tensors covers it: activation checkpointing drops it after the first forward and
keeps that of the recomputed one until its backward. Here is only how it gets from a backend's
kernel to the Function and back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _State(threading.local):
    """Of a thread: autograd runs backwards in threads of its own."""

    requested = False
    wanted = False
    left: torch.Tensor | None = None
    given: torch.Tensor | None = None


_state = _State()


@contextmanager
def requested() -> Iterator[None]:
    """Forwards in here whose backward needs Ŵ keep what they dequantize."""
    before, _state.requested = _state.requested, True
    try:
        yield
    finally:
        _state.requested = before


def run_forward(
    function: Callable[..., Any], needed: bool, *arguments: Any
) -> tuple[Any, torch.Tensor | None]:
    """The function's result, and the dense weight that its backend left, if one was requested and
    is `needed`: None where the path took none, or the backend keeps none."""
    if not (needed and _state.requested):
        return function(*arguments), None
    _state.wanted = True
    try:
        return function(*arguments), _state.left
    finally:
        _state.wanted, _state.left = False, None


def run_backward(function: Callable[..., Any], weight: torch.Tensor | None, *arguments: Any) -> Any:
    """The function's result; its backend may use `weight`, which the forward left."""
    if weight is None:
        return function(*arguments)
    _state.given = weight
    try:
        return function(*arguments)
    finally:
        _state.given = None


def is_wanted() -> bool:
    """Whether the forward that runs is to leave its dense weight."""
    return _state.wanted


def leave(weight: torch.Tensor) -> None:
    """Leave a forward's dense weight, in memory that nothing writes to any more."""
    _state.left = weight


def given(rows: int, like: torch.Tensor) -> torch.Tensor | None:
    """The dense weight for the backward that runs, if it has `rows` rows and like's dtype and
    device: that is how the same backend laid it out."""
    weight = _state.given
    if weight is None or len(weight) != rows or weight.dtype != like.dtype:
        return None
    return weight if weight.device == like.device else None
