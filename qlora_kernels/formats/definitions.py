"""Files of a user's own that register formats: `--define FILE.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from qlora_kernels.errors import ArgumentError, argument_error

_defined: list[str] = []


def import_definitions(paths: Iterable[str], op: str = "lab") -> None:
    """Run files that register formats of their own.

    Args:
        paths: of Python files.
        op: the command whose error it is.

    Raises:
        ArgumentError: a file that is missing or that fails, with its own words.
    """
    for given in paths:
        path = Path(given)
        name = f"qlora_kernels_defined_{path.stem}"
        if not path.is_file():
            raise argument_error(op, "--define", "a Python file", given)
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise argument_error(op, "--define", "a Python file (.py)", given)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (ArithmeticError, AttributeError, ImportError, LookupError) as error:
            raise definition_error(op, given, error) from error
        except (NameError, OSError, SyntaxError, TypeError, ValueError) as error:
            raise definition_error(op, given, error) from error
        whole = str(path.resolve())
        if whole not in _defined:
            _defined.append(whole)


def defined_files() -> tuple[str, ...]:
    """The files that were run in this process, by their whole paths: another one needs them too."""
    return tuple(_defined)


def definition_error(op: str, path: str, error: BaseException) -> ArgumentError:
    """The error for a file that does not run."""
    return argument_error(
        op, "--define", "a Python file that runs", f"{path} ({type(error).__name__}: {error})"
    )
