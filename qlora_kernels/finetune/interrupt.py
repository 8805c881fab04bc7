"""Turn SIGINT and SIGTERM into a request that the training loop honours between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_kernels.errors import QLKError


class Interrupted(QLKError):
    """Stopped on request with everything saved. ``exit_code`` is 128 + the signal, as shells do."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """The signal that asked to stop, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # A second signal of the kind must work even if the current step never ends.
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within, SIGINT and SIGTERM only set the yielded request; the old handlers come back after."""
    request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
