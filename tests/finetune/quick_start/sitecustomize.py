"""For the processes that the tests of `finetune` start: torch's optimizers without torch._dynamo.

They import it to exempt themselves from compilation, which takes as long as a short run. Here it is
what they ask of it and nothing more; whoever asks for anything else gets the real one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


class Exempting(ModuleType):
    """`disable` and `graph_break`, which mean nothing where nothing is compiled."""

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
        return fn if fn is not None else lambda function: function

    @staticmethod
    def graph_break(*_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(real(), name)


def real() -> ModuleType:
    """torch._dynamo itself, from now on."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
        del sys.modules[NAME]
    return importlib.import_module(NAME)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Of that one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == NAME:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if fullname.startswith(f"{NAME}."):
            real()
            return importlib.util.find_spec(fullname)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Exempting(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


FINDER = Finder()
sys.meta_path.insert(0, FINDER)
