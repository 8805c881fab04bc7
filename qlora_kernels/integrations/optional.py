"""Packages that are needed here only: imported when a function is called, named when missing."""

from __future__ import annotations

import importlib
from types import ModuleType

# Package -> the extra of this one that installs it.
EXTRAS = {
    "accelerate": "hf",
    "bitsandbytes": "bnb",
    "peft": "hf",
    "transformers": "hf",
}


def require(package: str, op: str) -> ModuleType:
    """The imported package.

    Raises:
        ImportError: it is not installed; the message names the extra that installs it.
    """
    root = package.split(".")[0]
    try:
        importlib.import_module(root)
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != root:
            raise
        raise ImportError(
            f"{op}: {root} must be installed: pip install 'qlora_kernels[{EXTRAS[root]}]'"
        ) from error
