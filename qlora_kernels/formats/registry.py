"""The format registry: a name for each Format; tests, benches and `--format` iterate it."""

from __future__ import annotations

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format

_FORMATS: dict[str, Format] = {}


def register_format(definition: Codebook | Format) -> Format:
    """Register a Format as it is, or a Codebook as a Format with the default block size, scale
    rule and store.

    Registering the same definition twice is harmless.

    Raises:
        ArgumentError: the name is empty or already stands for something else.
        ArgumentTypeError: neither a Codebook nor a Format.
    """
    if isinstance(definition, Codebook):
        definition = Format(definition.name, definition)
    if not isinstance(definition, Format):
        raise type_error(
            "register_format", "definition", "a Codebook or a Format", type(definition).__name__
        )
    if not definition.name:
        raise argument_error("register_format", "name", "non-empty", repr(definition.name))
    known = _FORMATS.get(definition.name)
    if known is not None and known != definition:
        raise argument_error(
            "register_format", "name", "new", f"{definition.name!r}, already another format"
        )
    _FORMATS[definition.name] = definition
    return definition


def get_format(name: str | Format) -> Format:
    """The registered Format of that name; a Format passes through.

    Raises:
        ArgumentError: unknown name; the message lists the known ones.
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str) or name not in _FORMATS:
        raise argument_error("get_format", "name", f"one of {list_formats()}", repr(name))
    return _FORMATS[name]


def list_formats() -> list[str]:
    """Names of all registered formats, sorted."""
    return sorted(_FORMATS)
