"""Fixtures of the `lab` tests; see `running`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.running import registered_within


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    yield from registered_within()
