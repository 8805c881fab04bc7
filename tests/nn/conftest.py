"""Fixtures of the modules' tests."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from qlora_kernels.nn import qlora_group


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each computation of a group was of."""
    counts: list[int] = []
    real = qlora_group.qlora_group_of

    def counting(op: str, x: Tensor, members: list[Any], *rest: Any) -> tuple[Tensor, ...]:
        counts.append(len(members))
        return real(op, x, members, *rest)

    monkeypatch.setattr(qlora_group, "qlora_group_of", counting)
    return counts
