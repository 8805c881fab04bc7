"""`python -m bench.run [--only quantize,dequantize]`: run the cases, print one table, keep records.

A record per case goes to bench/results/<machine>/<case>.json. The exit status is 0 whatever the
times are, unless --strict asks for 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch

from bench import cases
from bench.report import RESULTS, Row, Settings, machine_record, machine_slug, table, write_record

Case = Callable[[Settings], list[Row]]


def find_cases() -> dict[str, Case]:
    """Name -> `case_<name>` of every file in bench/cases."""
    found = {}
    for module in iter_modules(cases.__path__):
        found[module.name] = getattr(
            import_module(f"{cases.__name__}.{module.name}"), f"case_{module.name}"
        )
    return found


def parse(arguments: list[str] | None, names: list[str]) -> argparse.Namespace:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--only", help=f"comma-separated cases out of: {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="per comparison")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="per comparison")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a target is missed")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",") if options.only else names
    unknown = sorted(set(options.only) - set(names))
    if unknown:
        parser.error(f"argument --only must name cases out of {names}, got {unknown}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; returns the exit status."""
    found = find_cases()
    options = parse(arguments, sorted(found))
    settings = Settings(options.threads, options.rounds, options.seconds)
    torch.set_num_threads(settings.threads)
    folder = options.out / machine_slug()

    rows: list[Row] = []
    for name in options.only:
        measured = found[name](settings)
        path = write_record(name, measured, settings, folder)
        print(f"{name}: {len(measured)} rows, {path}", file=sys.stderr)
        rows += measured
    machine = machine_record(settings)
    print(
        f"{machine['cpu']} ({machine['isa']}), {settings.threads} threads, "
        f"torch {torch.__version__}, commit {machine['commit']}\n"
    )
    print(table(rows))
    missed = [row for row in rows if row.passed is False]
    print(f"\n{len(missed)} of {sum(r.passed is not None for r in rows)} targets missed")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
