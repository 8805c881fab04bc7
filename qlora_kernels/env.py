"""Every environment variable of the library, read here and nowhere else.

QLK_BACKEND        force a backend for all ops, e.g. "reference", "cpu", "cpu:avx2"; "auto" (the
                   default) picks per call
QLK_LIBRARY        path of the compiled library to load instead of the one in the package
TRITON_INTERPRET   Triton's own: 1 runs its kernels in an interpreter, on CPU tensors

Build-time variables (QLK_BUILD_CUDA, QLK_CUDA_ARCHS) belong to setup.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# os.environ encodes a name to look it up, and raises and catches where there is none, which takes
# longer than all other checks of an inference call. Its dictionary is asked first, where it has one
# (CPython's does), for the name as it is in there.
KNOWN: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
BACKEND_KEY: Any = getattr(os.environ, "encodekey", str)("QLK_BACKEND")


def backend() -> str:
    """QLK_BACKEND, "auto" when unset or empty."""
    return os.environ.get("QLK_BACKEND") or "auto"


def library_path() -> Path | None:
    """QLK_LIBRARY, or None when unset or empty."""
    value = os.environ.get("QLK_LIBRARY")
    return Path(value) if value else None


def triton_interpret() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
