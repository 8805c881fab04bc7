"""The process of one method in a comparison: `worker PARENT_PID SETTINGS_AS_JSON [FILE.py …]`, the
files being those that register formats.
"""

from __future__ import annotations

import json
import sys

from qlora_kernels.finetune.console import exit_code_of
from qlora_kernels.finetune.interrupt import (
    StopRequest,
    die_with,
    stop_on_signals,
    unblock_stop_signals,
)
from qlora_kernels.finetune.settings import settings_from_json


def main(parent: str, options: str, *definitions: str) -> int:
    """Run the method and return the process's exit code."""
    die_with(int(parent))

    def run() -> None:
        with stop_on_signals(StopRequest()) as stop:
            unblock_stop_signals()
            # Its imports take a while; a signal during them is only noted by now.
            from qlora_kernels.finetune.run import run_method
            from qlora_kernels.formats.definitions import import_definitions

            import_definitions(definitions, "finetune")
            run_method(settings_from_json(json.loads(options)), stop)

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
