"""Measure: `python -m bench.run`, or `python -m qlora_kernels bench`.

Without filters: the table of targets, a record per case in bench/results/<machine>/<case>.json.
With any of --backend, --format, --dtype, --shape, --tokens, --rank, --device or --peers: the grid
of ops × backends × formats × dtypes × layers × tokens beside its peers, one record.

    python -m bench.run --only dequantize,quantized_matmul
    python -m bench.run --only quantized_matmul --shape llama-7b --tokens 1,16,512 --backend all
    python -m bench.run --base HEAD~3 --shape small     # another commit, and what changed since
    python -m bench.run --tune --shape llama-3-8b       # launch configurations, on a GPU

The exit status is 0 whatever the times are, unless --strict asks for 1 when a target was missed;
a wrong result is always 1, and is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch

from bench import cases
from bench.grid.points import DTYPES, GRID_OPS
from bench.machine import machine_record, machine_slug
from bench.records import RESULTS, AnyRow, Settings, table, write_record
from qlora_kernels.errors import QLKError

Case = Callable[[Settings], Sequence[AnyRow]]
# Options of the grid and what they are without being given.
GRID_DEFAULTS = {
    "backend": "auto",
    "format": "nf4",
    "dtype": "bf16",
    "shape": "small",
    "tokens": "1,16,512",
    "rank": "16",
    "device": "cpu",
    "peers": "all",
}


def case_names() -> list[str]:
    """Of every file in bench/cases."""
    return sorted(module.name for module in iter_modules(cases.__path__))


def find_case(name: str) -> Case:
    """`case_<name>` of bench/cases/<name>.py; raises ModuleNotFoundError without its peers."""
    found: Case = getattr(import_module(f"{cases.__name__}.{name}"), f"case_{name}")
    return found


def build_parser() -> argparse.ArgumentParser:
    """The options of a run."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m bench.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*case_names(), *(op for op in GRID_OPS if op not in case_names())]
    parser.add_argument("--only", help=f"comma-separated, out of: {', '.join(names)}")
    grid = parser.add_argument_group("the grid (lists are comma-separated)")
    grid.add_argument("--backend", help='names, families, "auto" (the one taken) or "all"')
    grid.add_argument("--format", help='registered formats, or "all"')
    grid.add_argument("--dtype", help=f"out of {', '.join(DTYPES)}")
    grid.add_argument("--shape", help='NxK, a layer ("llama-7b.gate"), a model, or "all"')
    grid.add_argument("--tokens", help="numbers M of tokens")
    grid.add_argument("--rank", help="ranks R of the adapters")
    grid.add_argument("--device", help="cpu or cuda")
    grid.add_argument("--peers", help='parts of peers\' names, "none" or "all"')
    parser.add_argument("--base", metavar="REV", help="measure this commit too, and compare")
    parser.add_argument("--repeats", type=int, default=2, help="of each side, with --base")
    parser.add_argument("--tune", action="store_true", help="tune Triton's launches; needs a GPU")
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="per comparison")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="per comparison")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a target is missed")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the options say; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options = parser.parse_args(given)
    settings = Settings(options.threads, options.rounds, options.seconds)
    torch.set_num_threads(settings.threads)
    grid = [name for name in GRID_DEFAULTS if getattr(options, name) is not None]
    try:
        if options.base is not None:
            from bench import base

            return base.main(given, options)
        if options.tune:
            from bench import tune

            return tune.main(options)
        only = options.only.split(",") if options.only else None
        if grid or (only and not set(only) & set(case_names())):
            from bench.grid import command

            return command.main(options, settings)
        return targets(parser, only or case_names(), settings, options)
    except QLKError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def targets(
    parser: argparse.ArgumentParser,
    names: Sequence[str],
    settings: Settings,
    options: argparse.Namespace,
) -> int:
    """The table of targets."""
    unknown = sorted(set(names) - set(case_names()))
    if unknown:
        parser.error(f"argument --only must name cases out of {case_names()}, got {unknown}")
    folder = options.out / machine_slug()
    rows: list[AnyRow] = []
    left_out = []
    for name in names:
        try:
            case = find_case(name)
        except ModuleNotFoundError as error:
            left_out.append(f"{name}: {error.name} is not installed")
            continue
        measured = case(settings)
        path = write_record(name, measured, settings, folder)
        print(f"{name}: {len(measured)} rows, {path}", file=sys.stderr)
        rows += measured
    machine = machine_record(settings.threads)
    print(
        f"{machine['cpu']} ({machine['isa']}), {settings.threads} threads, "
        f"torch {torch.__version__}, commit {machine['commit']}\n"
    )
    print(table(rows))
    missed = [row for row in rows if row.passed is False]
    print(f"\n{len(missed)} of {sum(r.passed is not None for r in rows)} targets missed")
    for line in left_out:
        print(f"not measured: {line}")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
