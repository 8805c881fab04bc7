"""Locates and loads the native library; where it cannot, keeps the reason for `info` and errors.

The library registers its ops under `torch.ops.qlora_kernels_native`. It is one file for every
Python and every torch >= 2.10 (see setup.py), so it is loaded with `torch.ops.load_library`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_kernels import env

_PACKAGE = Path(__file__).resolve().parent.parent
_DEFAULT_PATH = _PACKAGE / "libqlora_kernels.so"
# Written by setup.py where it could not build: one line saying why.
_NOT_BUILT = _PACKAGE / "_not_built.txt"


@dataclass(frozen=True)
class Library:
    """Outcome of loading the native library: `missing` is None if it is loaded, else the reason."""

    path: Path
    missing: str | None
    build: Mapping[str, str] = field(default_factory=dict)
    """What it was built with: compiler, torch and, with CUDA kernels, cuda_archs, cuda_runtime."""


@functools.cache
def load() -> Library:
    """Loads the native library once per process. Never raises; see `Library.missing`.

    The file is the one `QLK_LIBRARY` names, or the one installed with the package.
    """
    path = env.library_path() or _DEFAULT_PATH
    if not path.is_file():
        return Library(path, _why_absent(path))
    try:
        torch.ops.load_library(str(path))
        info = torch.ops.qlora_kernels_native.build_info()
    except (OSError, RuntimeError, AttributeError) as error:
        # torch's own message stops at the path; the loader's, which names the symbol, is its cause.
        cause = error.__cause__ or error
        return Library(path, f"{path.name} does not load with torch {torch.__version__}: {cause}")
    return Library(path, None, dict(line.split("=", 1) for line in info.splitlines()))


def _why_absent(path: Path) -> str:
    if path != _DEFAULT_PATH:
        return f"QLK_LIBRARY names no file: {path}"
    if _NOT_BUILT.is_file():
        return _NOT_BUILT.read_text(encoding="utf-8").strip()
    return "it was never built: run `make build`, or `pip install --no-build-isolation -e .`"
