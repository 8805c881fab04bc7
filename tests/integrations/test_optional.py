"""What is not installed is named, with the extra that installs it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.integrations.optional import EXTRAS, require
from qlora_kernels.integrations.peft import patch_peft


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("bitsandbytes", "bnb", qlk.patch_bitsandbytes),
        ("peft", "hf", patch_peft),
        ("transformers", "hf", lambda: require("transformers", "convert")),
    ],
)
def test_missing_package(
    package: str, extra: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} must be installed: .*\[{extra}\]"):
        call()


def test_an_import_that_fails_inside_a_package_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.no_such_part", None)
    monkeypatch.setitem(EXTRAS, "torch", "hf")
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        require("torch.no_such_part", "test")


def test_accelerate_needs_none_of_them() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert not qlk.accelerate(model, verbose=False).fused


def test_names_are_listed_and_unknown_ones_refused() -> None:
    for name in qlk.__all__:
        assert getattr(qlk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlk.nothing
