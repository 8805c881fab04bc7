"""The command line: `python -m qlora_kernels COMMAND`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qlora_kernels import info


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = argparse.ArgumentParser(prog="qlora_kernels", description="Kernels for QLoRA.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("info", help="what runs on this machine, and why the rest does not")
    shown.add_argument("--markdown", action="store_true", help="print the README's support matrix")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = build_parser().parse_args(argv)
    info.main(markdown=arguments.markdown)
    return 0
