"""The command line: `python -m qlora_kernels COMMAND`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from qlora_kernels import info
from qlora_kernels.finetune import command as finetune
from qlora_kernels.integrations import command as convert


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of two dozen options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = Parser(prog="python -m qlora_kernels", description="Kernels for QLoRA.")
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "finetune":
        return finetune.main(arguments)
    if arguments.command == "convert":
        return convert.main(arguments)
    if arguments.command == "plan":
        return convert.plan_main(arguments)
    info.main(markdown=arguments.markdown)
    return 0
