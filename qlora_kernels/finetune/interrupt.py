"""Signals: SIGINT and SIGTERM become a request that the training loop honours between two steps, or
that a parent hands on to the process of the method that runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from qlora_kernels.errors import QLKError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# linux/prctl.h
PR_SET_PDEATHSIG = 1


class EndedError(QLKError):
    """The program ends with ``exit_code``; an empty message means that the user has been told."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(EndedError):
    """Stopped on request. The exit code is 128 + the signal, as shells do."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, 128 + signal_number)


class StopRequest:
    """The signal that asked to stop, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # A second signal of the kind must work even if the current step never ends.
        signal.signal(number, signal.SIG_DFL)

    def check(self, doing: str) -> None:
        """Raises Interrupted if a stop was requested."""
        if self.signal is not None:
            raise Interrupted(f"stopped {doing}; --resume continues", self.signal)


class Relay(StopRequest):
    """A stop request that also goes to the child process that is running, if any.

    The child runs in a session of its own, so that Ctrl-C in a terminal reaches it once, from here,
    and not twice; a second Ctrl-C then ends it as it would end a run of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def call(self, command: Sequence[str]) -> int:
        """Run ``command`` and return its exit code, negative for the signal that killed it."""
        # Blocked until the child has its handlers (`unblock_stop_signals`), so that a signal meets
        # them whenever it arrives, and not an interpreter that is still importing.
        with stop_signals_blocked():
            self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        if self.signal is not None:
            # It came before there was a child to send it to. Sent twice is received once, because
            # the child still blocks it.
            self.child.send_signal(self.signal)
        try:
            return self.child.wait()
        finally:
            if self.child.poll() is None:
                self.child.kill()
            self.child = None


Handler = TypeVar("Handler", bound=StopRequest)


@contextmanager
def stop_on_signals(request: Handler) -> Iterator[Handler]:
    """Within, SIGINT and SIGTERM only call ``request``; the old handlers come back after."""
    previous = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Within, SIGINT and SIGTERM wait; a process started within inherits that."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def unblock_stop_signals() -> None:
    """Let SIGINT and SIGTERM through again, in a process started by `Relay.call`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def die_with(parent: int) -> None:
    """Have the system kill this process when ``parent``, which started it, is gone.

    A parent killed by SIGKILL cannot stop its child, which would go on writing into a folder that
    the user resumes in. Only Linux has this; elsewhere the folder's lock keeps the two apart.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before the system was asked
        os.kill(os.getpid(), signal.SIGKILL)
