"""Writes optimal_tables.py: `python -m qlora_kernels.formats.make_tables`, about two minutes.

The tables are solutions of block_maximum.py's equations, rounded to 9 decimals: as literals they
are the same float32 on every machine, and importing the package solves nothing.
"""

from __future__ import annotations

import pathlib

from qlora_kernels.formats.block_maximum import Criterion, median_table, optimal_table

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Kind of table -> (levels, signed absmax, criterion).
BOF: dict[str, tuple[int, bool, Criterion]] = {
    "bof4_mse": (16, False, "mse"),
    "bof4_mae": (16, False, "mae"),
    "bof4s_mse": (16, True, "mse"),
    "bof4s_mae": (16, True, "mae"),
    "bof3s_mse": (8, True, "mse"),
    "bof2s_mse": (4, True, "mse"),
}
_HEADER = '''"""Optimal tables by kind and block size; written by make_tables.py."""

# fmt: off
TABLES: dict[str, dict[int, tuple[float, ...]]] = {
'''


def solve_af4(block_size: int) -> tuple[float, ...]:
    """AF4: the two halves of medians, and 0 between them."""
    return (*median_table(7, block_size, -1), 0.0, *median_table(8, block_size, 1))


def solve_bof(
    levels: int, block_size: int, signed: bool, criterion: Criterion
) -> tuple[float, ...]:
    """BOF: the optimal table with 0 and the place of the block's maximum pinned."""
    pins = (0.0, 1.0) if signed else (-1.0, 0.0, 1.0)
    return optimal_table(levels, block_size, pins, criterion)


def solve(kind: str, block_size: int) -> tuple[float, ...]:
    """The table of a kind ("af4" or a key of BOF), rounded."""
    if kind == "af4":
        table = solve_af4(block_size)
    else:
        levels, signed, criterion = BOF[kind]
        table = solve_bof(levels, block_size, signed, criterion)
    return tuple(round(value, 9) + 0.0 for value in table)


def main() -> None:
    """Solve everything and write the file."""
    text = _HEADER
    for kind in ("af4", *BOF):
        text += f'    "{kind}": {{\n'
        for block_size in BLOCK_SIZES:
            values = [repr(value) for value in solve(kind, block_size)]
            text += f"        {block_size}: (\n"
            for i in range(0, len(values), 6):
                text += "            " + ", ".join(values[i : i + 6]) + ",\n"
            text += "        ),\n"
        text += "    },\n"
    text += "}\n"
    pathlib.Path(__file__).with_name("optimal_tables.py").write_text(text)


if __name__ == "__main__":
    main()
