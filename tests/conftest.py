"""The order of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest

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
