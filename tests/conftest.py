"""The order of the whole suite, and the random numbers of each of its tests."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

# Minutes in one test.
LONGEST = ("triton/test_in_interpreter.py", "finetune/test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then those with slow tests: where files are handed to several
    processes, a long one among the last would leave the others without work."""
    first = [Path(__file__).parent / name for name in LONGEST]
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def order(item: pytest.Item) -> tuple[bool, bool]:
        return item.path not in first, item.path not in slow

    items.sort(key=order)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seeds a test by its name, before its fixtures: what it draws, and so whether it fails, does
    not depend on the tests before it in its process. TEST_SEED gives other numbers."""
    seed = zlib.crc32(f"{os.environ.get('TEST_SEED', '')}{item.nodeid}".encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
