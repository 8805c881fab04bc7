"""The format registry: a name for each Format; tests, benches and `--format` iterate it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format

_FORMATS: dict[str, Format] = {}

# Known types that are not a table times a scale, and why no Format can say them.
_OTHER_KINDS = {
    "qtip": "a weight depends on the codes before it (a trellis), not on its own code alone",
    "quip#": "eight weights share one code of the E8 lattice, under rotations of both sides",
    "aqlm": "groups of weights are sums of vectors from learned codebooks of 2^8 entries and more",
    "higgs": "two and more weights share a code (p >= 2); at p = 1 it is a table, but of rotated "
    "weights, and x would have to be rotated too",
}
_ALIASES = {"quip-sharp": "quip#", "quip_sharp": "quip#", "quipsharp": "quip#"}


def register(name: str) -> Callable[[Callable[[], Format]], Callable[[], Format]]:
    """Decorator: register the Format that a function of no arguments returns under `name`.

    Raises:
        ArgumentError: as `register_format`.
    """

    def decorate(make: Callable[[], Format]) -> Callable[[], Format]:
        register_format(dataclasses.replace(make(), name=name))
        return make

    return decorate


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


def get_format(name: str | Format, op: str = "get_format", argument: str = "name") -> Format:
    """The registered Format of that name; a Format passes through.

    Args:
        name: a name out of `list_formats`, or a Format.
        op, argument: what an error names: the function that was called, and its argument.

    Raises:
        ArgumentError: unknown name; the message lists the known ones, or says why a known type of
            that name is none.
    """
    if isinstance(name, Format):
        return name
    kind = name.lower() if isinstance(name, str) else ""
    reason = _OTHER_KINDS.get(_ALIASES.get(kind, kind))
    if reason is not None and name not in _FORMATS:
        rule = "a format that is one table of at most 16 values times a scale per block"
        raise argument_error(op, argument, rule, f"{name!r}: {reason}")
    if not isinstance(name, str) or name not in _FORMATS:
        raise argument_error(op, argument, f"one of {list_formats()}", repr(name))
    return _FORMATS[name]


def list_formats() -> list[str]:
    """Names of all registered formats, sorted."""
    return sorted(_FORMATS)
