"""Tables as people and programs read them: text, CSV, JSON and Markdown, written whole."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kernels.errors import QLKError
from qlora_kernels.files import write_atomically, write_text
from qlora_kernels.finetune.report import machine

Row = Mapping[str, Any]
# How figures are shown; files hold them whole.
FORMATS = {
    "bits": ".3f",
    "relative error": ".5f",
    "NMSE dB": ".2f",
    "max error": ".4f",
    "code entropy": ".3f",
    "cosine mean": ".5f",
    "cosine min": ".5f",
}


@dataclass(frozen=True)
class Table:
    """Rows of the same columns, and what they mean.

    Attributes:
        title: of the Markdown page.
        rows: column -> value; a value that a row lacks is shown as "-".
        notes: lines below the Markdown table.
        facts: what else the JSON file holds.
    """

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def cells(self) -> list[list[str]]:
        """The header and the rows as text."""
        columns = self.columns
        return [columns, *([shown(name, row.get(name)) for name in columns] for row in self.rows)]


def shown(column: str, value: object) -> str:
    """One figure in a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return format(value, FORMATS.get(column, ".4g"))
    return str(value)


def text_table(table: Table) -> str:
    """Aligned columns; numbers to the right."""
    cells = table.cells()
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    numeric = numeric_columns(table)
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold numbers."""
    return [
        any(isinstance(row.get(name), int | float) for row in table.rows) for name in table.columns
    ]


def markdown(table: Table, plots: Sequence[str]) -> str:
    """A page: the table, the plots, the notes, the machine."""
    header, *rows = table.cells()
    rules = ["---:" if right else "---" for right in numeric_columns(table)]
    lines = [f"# {table.title}", "", *(f"![{Path(name).stem}]({name})\n" for name in plots)]
    lines += ["| " + " | ".join(row) + " |" for row in (header, rules, *rows)]
    lines += ["", *(f"- {note}" for note in table.notes)]
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    return "\n".join([*lines, f"- Machine: {facts}", ""])


def csv_text(table: Table) -> str:
    """RFC 4180, figures in full."""
    held = io.StringIO()
    writer = csv.DictWriter(held, table.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return held.getvalue()


def write_table(out: Path, stem: str, table: Table, plots: Mapping[str, bytes]) -> list[Path]:
    """Write ``stem``.csv, .json and .md and the plots by name; returns their paths.

    Raises QLKError where one cannot be written.
    """
    content = {"title": table.title, "machine": machine(), **table.facts, "rows": list(table.rows)}
    texts = {
        f"{stem}.csv": csv_text(table),
        f"{stem}.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        f"{stem}.md": markdown(table, list(plots)),
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, png in plots.items():
            write_atomically(out / name, [png])
        for name, text in texts.items():
            write_text(out / name, text)
    return [out / name for name in (*texts, *plots)]


def write_json(path: Path, content: Any) -> Path:
    """Write one JSON file. Raises QLKError where it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an OSError becomes a QLKError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise QLKError(f"lab: cannot write {path} ({error.strerror or error})") from error
