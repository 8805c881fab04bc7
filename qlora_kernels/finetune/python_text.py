"""Text that the running Python brings along: documentation for the base model, source code for the
demo's adaptation. Nothing is shipped; a given Python always yields the same text in the same order.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from qlora_kernels.errors import QLKError

# Tests are not the library; `encodings` is character tables; `pydoc_data` is the documentation
# that the base model is trained on.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


def is_held_out(name: str) -> bool:
    """Whether a file name belongs to the held-out tenth: a fixed function of the name alone."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def library_sources() -> dict[str, str]:
    """Source text of every standard-library module by POSIX path relative to the library, sorted.

    Raises:
        QLKError: the running Python has no readable library sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            sources[relative.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    sources = {name: text for name, text in sorted(sources.items()) if text.strip()}
    if not sources:
        raise QLKError(f"finetune: no library sources under {root}; give --data instead")
    return sources


def split_library_sources() -> tuple[list[str], list[str]]:
    """Library sources as (train, held-out) documents, split by the hash of the file name."""
    sources = library_sources()
    train = [text for name, text in sources.items() if not is_held_out(name)]
    held_out = [text for name, text in sources.items() if is_held_out(name)]
    return train, held_out


def documentation() -> list[str]:
    """What the base model is trained on: the language reference's topics, and the docstrings of the
    library modules that are *not* held out (so that nothing held out was ever seen).
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    for name, source in library_sources().items():
        if not is_held_out(name):
            documents.append("\n\n".join(docstrings(source)))
    return [text for text in documents if text.strip()]


def docstrings(source: str) -> Iterator[str]:
    """Cleaned docstrings of a module, its classes and functions; none for source of another
    Python (the library holds a few Python 2 and template files)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)
