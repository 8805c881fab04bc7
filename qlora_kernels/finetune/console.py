"""What a person sees: lines on stderr, and errors as one line with an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import torch

from qlora_kernels.errors import ArgumentError, ArgumentTypeError, QLKError
from qlora_kernels.finetune.interrupt import EndedError

BAD_ARGUMENTS = 2
FAILED = 1


def say(text: str) -> None:
    """One line on stderr; stdout is for the results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def exit_code_of(action: Callable[[], None]) -> int:
    """Run ``action``: 0, or the exit code of what stopped it, after saying so in one line.

    2 for bad arguments, 128 + the signal for an interrupted run, 1 for every other failure.
    """
    try:
        action()
    except EndedError as ended:
        if str(ended):
            say(str(ended))
        return ended.exit_code
    except KeyboardInterrupt:
        say("stopped before anything began")
        return 128 + signal.SIGINT
    except (ArgumentError, ArgumentTypeError) as error:
        return fail(str(error), BAD_ARGUMENTS)
    except (QLKError, OSError) as error:
        return fail(str(error), FAILED)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).strip().split("\n")[0] or "no more memory"
        return fail(f"finetune: {reason}; a smaller --batch or --seq-len needs less", FAILED)
    return 0


def fail(message: str, code: int) -> int:
    """Say what went wrong, on one line whatever ``message`` holds, and return ``code``."""
    say("error: " + " ".join(message.split()))
    return code
