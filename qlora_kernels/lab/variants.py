"""Formats with their options: what a table has a row for and a cell is computed of.

A `Format` is data, and what distinguishes two of them is read off its fields: a field that is added
to it is part of a variant's definition without a word here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kernels.errors import ArgumentError, CheckpointError, argument_error
from qlora_kernels.formats import Format, get_format, list_formats
from qlora_kernels.formats import format as format_module

# The fields of a Format that a sweep varies -> the type in formats.format that lists their values;
# block sizes are given as numbers.
AXES = {"block_size": "", "scale_store": "ScaleStore", "encoder": "EncoderName"}
OWN, ALL = "own", "all"
# Not part of what a format stores: its name, and the rule that gave its table.
NAMES_ONLY = frozenset({"name", "codebook_rule"})
# Stores whose scales are near enough to the exact ones for codes that are taken against those.
NEAR_STORES = ("fp32", "double_quant")


@dataclass(frozen=True)
class Variant:
    """A registered format with some of its fields set otherwise.

    Attributes:
        name: of the registered format.
        changes: field -> value, as JSON holds it.
        format: what they make.
    """

    name: str
    changes: tuple[tuple[str, Any], ...]
    format: Format

    @classmethod
    def of(cls, name: str, changes: Mapping[str, Any]) -> Variant:
        """Raises ArgumentError for an unknown name or a value that the format does not take."""
        own = get_format(name)
        held = {key: value for key, value in changes.items() if getattr(own, key) != value}
        if needs_decoded(held):
            # bitsandbytes' way of encoding is for bitsandbytes' way of choosing and storing scales.
            held.setdefault("encode_against", "decoded")
        return cls(name, tuple(sorted(held.items())), dataclasses.replace(own, **held))

    @classmethod
    def from_json(cls, value: Any) -> Variant:
        """Inverse of `to_json`. Raises CheckpointError for anything else."""
        if not isinstance(value, dict) or not isinstance(value.get("format"), str):
            raise CheckpointError(f"lab: not a format's description: {value!r}")
        changes = {key: held for key, held in value.items() if key != "format"}
        unknown = set(changes) - {field.name for field in dataclasses.fields(Format)}
        if unknown:
            raise CheckpointError(f"lab: a Format has no {', '.join(sorted(unknown))}")
        return cls.of(value["format"], changes)

    def to_json(self) -> dict[str, Any]:
        """The format's name and what differs from the registered one."""
        return {"format": self.name, **dict(self.changes)}

    @property
    def label(self) -> str:
        """Short and unique: name, block size and what else was changed."""
        fields = [f"b{self.format.block_size}"]
        shown = [key for key in axes() if key != "block_size"]
        fields += [str(value) for key, value in self.changes if key in shown]
        return " ".join([self.name, *fields])

    @property
    def columns(self) -> dict[str, Any]:
        """The variant's part of a table's row."""
        held = {axis: getattr(self.format, axis) for axis in axes()}
        return {"format": self.name, **held}

    @property
    def digest(self) -> str:
        """Identifies the definition; the name does not matter."""
        text = json.dumps(definition(self.format), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def needs_decoded(changes: Mapping[str, Any]) -> bool:
    """Whether codes must be taken against the scales that dequantize will see."""
    searched = changes.get("encoder", "nearest") != "nearest"
    return searched or changes.get("scale_store", "fp32") not in NEAR_STORES


def axes() -> list[str]:
    """The fields of `AXES` that a Format has."""
    fields = {field.name for field in dataclasses.fields(Format)}
    return [axis for axis in AXES if axis in fields]


def choices(axis: str) -> tuple[str, ...]:
    """The values that a Format's field can take, where its type lists them."""
    return typing.get_args(getattr(format_module, AXES[axis], None))


def make_variants(
    names: Sequence[str] | None, given: Mapping[str, Sequence[Any]]
) -> tuple[list[Variant], list[str]]:
    """Every combination of formats and of values for their axes.

    Args:
        names: registered formats; None takes all.
        given: axis -> values. "own" keeps the format's own value, "all" stands for every value.

    Returns:
        The variants, without those that are another one's definition, and one line on each
        combination that a format does not take.

    Raises:
        ArgumentError: an unknown name or value, or no variant at all.
    """
    values: dict[str, list[Any]] = {axis: expanded(axis, given[axis]) for axis in given}
    found: dict[str, Variant] = {}
    refused: list[str] = []
    for name in names if names is not None else list_formats():
        get_format(name)
        for combination in itertools.product(*values.values()):
            picked = dict(zip(values, combination, strict=True))
            changes = {axis: value for axis, value in picked.items() if value != OWN}
            try:
                variant = Variant.of(name, changes)
            except ArgumentError as error:
                refused.append(f"{name} with {changes}: {error}")
                continue
            found.setdefault(variant.digest, variant)
    if not found:
        raise argument_error("lab", "the formats", "at least one that is possible", refused[0])
    return list(found.values()), refused


def expanded(axis: str, values: Iterable[Any]) -> list[Any]:
    """Values with "all" replaced; raises ArgumentError for one that no format takes."""
    possible = choices(axis)
    held: list[Any] = []
    for value in values:
        if value == ALL and possible:
            held += possible
        elif possible and value not in (*possible, OWN):
            rule = f"{OWN}, {ALL} or one of {', '.join(possible)}"
            raise argument_error("lab", f"--{axis.replace('_', '-')}s", rule, value)
        else:
            held.append(value)
    return list(dict.fromkeys(held))


def definition(value: Any) -> Any:
    """Everything that decides what a format stores, as JSON; names are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.compare and f.name not in NAMES_ONLY]
        return {field.name: definition(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple | list):
        return [definition(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): definition(item) for key, item in value.items()}
    return value
