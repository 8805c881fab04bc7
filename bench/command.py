"""`python -m qlora_kernels bench [run | compare | report | on_gpu] …`, also `python -m bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "run": "measure (the default)",
    "compare": "two records: what became slower",
    "report": "records as a page and plots",
    "on_gpu": "everything that a GPU machine should run, in stages",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the arguments to the command's module; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--help"], ["-h"]):
        lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
        print("usage: bench [COMMAND] [OPTION …], each with its own --help\n" + "\n".join(lines))
        return 0
    name = given.pop(0) if given and given[0] in COMMANDS else "run"
    status: int = import_module(f"bench.{name}").main(given)
    return status
