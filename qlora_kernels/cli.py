"""The command line: `python -m qlora_kernels COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qlora_kernels import info
from qlora_kernels.finetune import command as finetune
from qlora_kernels.formats.definitions import import_definitions
from qlora_kernels.integrations import command as convert
from qlora_kernels.lab import command as lab
from qlora_kernels.lab.console import run

# Where bench/ is if the package is run from a checkout, also from an editable install of one.
CHECKOUT = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of two dozen options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = Parser(prog="python -m qlora_kernels", description="Kernels for QLoRA.")
    parser.add_argument(
        "--define",
        metavar="FILE.py",
        help="first run a Python file that registers formats; may be given several times",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("info", help="what runs on this machine, and why the rest does not")
    shown.add_argument("--markdown", action="store_true", help="print the README's support matrix")
    tuned = commands.add_parser(
        "finetune",
        help=finetune.SUMMARY,
        description=finetune.DESCRIPTION,
        epilog=finetune.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    finetune.add_options(tuned)
    converted = commands.add_parser(
        "convert", help=convert.SUMMARY, description=convert.DESCRIPTION
    )
    convert.add_options(converted)
    planned = commands.add_parser("plan", help=convert.PLAN_SUMMARY)
    convert.add_plan_options(planned)
    compared = commands.add_parser("lab", help=lab.SUMMARY, description=lab.DESCRIPTION)
    lab.add_commands(compared)
    # Listed here, but parsed by bench itself: see `main`.
    commands.add_parser(
        "bench", help="measure ops, layers and memory against peers", add_help=False
    )
    return parser


def bench(arguments: Sequence[str]) -> int:
    """Run bench/, which a checkout has and an installed package has not."""
    if not (CHECKOUT / "bench" / "command.py").is_file():
        sys.stderr.write(
            "error: bench: the benchmarks are not installed with the package; run this from a "
            "checkout of the project (pip install -e '.[bench]' in it)\n"
        )
        return 2
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    status: int = importlib.import_module("bench.command").main(list(arguments))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--define"] and len(given) > 1:
        # Before the parser is built: `--format` offers what is registered by then.
        status = run(lambda: import_definitions([given[1]], "qlora_kernels"))
        return status or main(given[2:])
    if given[:1] == ["bench"]:
        return bench(given[1:])
    arguments = build_parser().parse_args(given)
    if arguments.command == "finetune":
        if arguments.plan:
            return finetune.plan(arguments, convert.show_plan)
        return finetune.main(arguments)
    if arguments.command == "convert":
        return convert.main(arguments)
    if arguments.command == "plan":
        return convert.plan_main(arguments)
    if arguments.command == "lab":
        return lab.main(arguments)
    info.main(markdown=arguments.markdown)
    return 0
