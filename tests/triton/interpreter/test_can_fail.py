"""The interpreter's tests can fail: each mutation of a kernel must turn one of them red."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qlora_kernels.backends.triton import kernels
from qlora_kernels.backends.triton.launch import kernel_named
from tests.can_fail.triton_kernels import MUTATIONS
from tests.can_fail.triton_mutation import TritonMutation

SOURCES = Path(kernels.__path__[0])
PREFIX = f"{kernels.__name__}."


@contextmanager
def replaced(file: str, source: Path) -> Iterator[None]:
    """Inside, the module `file` of the kernels is loaded from `source`, and the others anew."""
    right = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PREFIX)}
    kernel_named.cache_clear()
    spec = importlib.util.spec_from_file_location(PREFIX + file, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PREFIX + file] = module
    spec.loader.exec_module(module)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(PREFIX)]:
            del sys.modules[name]
        sys.modules.update(right)
        for name, loaded in right.items():
            setattr(kernels, name.removeprefix(PREFIX), loaded)
        kernel_named.cache_clear()


def mutant(mutation: TritonMutation, folder: Path) -> Path:
    """The changed source, in `folder`."""
    text = (SOURCES / f"{mutation.file}.py").read_text()
    assert text.count(mutation.old) == mutation.count, f"{mutation.file}.py no longer has it"
    changed = folder / f"{mutation.file}.py"
    changed.write_text(text.replace(mutation.old, mutation.new))
    return changed


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_wrong_kernel_turns_a_test_red(
    device: torch.device, mutation: TritonMutation, tmp_path: Path
) -> None:
    changed = mutant(mutation, tmp_path)
    with replaced(mutation.file, changed), pytest.raises(AssertionError) as caught:
        mutation.check(device)
    assert "no longer has it" not in str(caught.value)


@pytest.mark.parametrize("file", sorted({mutation.file for mutation in MUTATIONS}))
def test_a_kernel_that_is_only_reloaded_is_right(device: torch.device, file: str) -> None:
    checks = [mutation.check for mutation in MUTATIONS if mutation.file == file]
    with replaced(file, SOURCES / f"{file}.py"):
        checks[-1](device)
