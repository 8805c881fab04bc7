"""Wrong kernels: a fault in a copy of csrc, and the check that must see it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.emulation.cuda.runner import (
    ROOT,
    KernelStopped,
    Runner,
    build_emulated,
    start,
    why_no_emulation,
)


@dataclass(frozen=True)
class Mutation:
    """One wrong kernel.

    Attributes:
        what: the fault, as the test's name.
        source: the changed file, relative to csrc.
        changes: (old, new) texts; each old one occurs exactly once.
        check: the check that must fail.
        also: (file, old, new): what else to change, so that it compiles in less time.
        mode: where; in "races" it must be TSAN that complains.
    """

    what: str
    source: str
    changes: tuple[tuple[str, str], ...]
    check: str
    mode: str = "plain"
    also: tuple[tuple[str, str, str], ...] = ()


def assert_turns_red(
    mutation: Mutation, checks: Mapping[str, Callable[[Runner, int], None]], tmp_path: Path
) -> None:
    """The mutation's check fails, in a mode of its own by the sanitizer's word."""
    reason = why_no_emulation()
    if reason:
        pytest.skip(reason)
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("*.cpp"))
    own = [(mutation.source, old, new) for old, new in mutation.changes]
    for name, old, new in (*own, *mutation.also):
        text = (csrc / name).read_text()
        assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
        (csrc / name).write_text(text.replace(old, new))
    runner = start(mutation.mode, build_emulated(mutation.mode, csrc))
    with pytest.raises(AssertionError) as caught:
        for seed in range(1, 4):
            checks[mutation.check](runner, seed)
    if mutation.mode != "plain":
        assert isinstance(caught.value, KernelStopped), caught.value
        tool = "ThreadSanitizer" if mutation.mode == "races" else "AddressSanitizer"
        assert tool in str(caught.value)
