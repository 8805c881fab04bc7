"""Full fine-tuning, LoRA and QLoRA with the same budget, each in a process of its own, so that its
peak memory is its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any

from qlora_kernels.finetune.interrupt import EndedError, Interrupted, Relay
from qlora_kernels.finetune.outputs import REPORT, claimed, read_report, remove_leftovers
from qlora_kernels.finetune.report import document, with_gains, write_report
from qlora_kernels.finetune.settings import METHODS, Settings
from qlora_kernels.formats.definitions import defined_files

# QLoRA first: it meets every option that can be wrong within seconds; full fine-tuning, which costs
# the most and meets the fewest, last.
ORDER = ("qlora", "lora", "full")


def run_comparison(out: Path, runs: Sequence[Settings], relay: Relay) -> dict[str, Any]:
    """Run every method in ``out``/method, write report.json, and return its content.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the method that ran has saved.
        EndedError: a method failed, with its exit code.
    """
    by_method = {run.method: run for run in runs}
    with claimed(out):
        for number, method in enumerate(ORDER, start=1):
            code = relay.call(worker_command(by_method[method]))
            if relay.signal is not None and (code != 0 or number < len(ORDER)):
                killed = code < 0
                told = f"stopped while {method} ran; --resume continues" if killed else ""
                if code == 0:
                    told = f"stopped after {method}; --resume continues"
                raise Interrupted(told, relay.signal)
            if code != 0:
                raise failure(method, code)
        saved = {method: read_report(by_method[method].out / REPORT) for method in METHODS}
        content = document(
            "compare",
            with_gains({method: report["methods"][method] for method, report in saved.items()}),
        )
        remove_leftovers(out)
        write_report(out, content)
    return content


def worker_command(settings: Settings) -> list[str]:
    """The command that runs one method; see `worker`."""
    options = json.dumps(settings.to_json())
    worker = [sys.executable, "-m", "qlora_kernels.finetune.worker", str(os.getpid()), options]
    return [*worker, *defined_files()]


def failure(method: str, code: int) -> EndedError:
    """The error for a process that ended with ``code``; it has said why unless a signal killed
    it."""
    if code > 0:
        return EndedError("", code)
    name = Signals(-code).name
    hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
    return EndedError(f"error: finetune: {method} was killed by {name}{hint}", 128 - code)
