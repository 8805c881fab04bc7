"""Error types of the library and the one way its messages are built: `op: argument must be …, got
…`."""

from __future__ import annotations


class QLKError(Exception):
    """Base of every error this library raises on purpose."""


class ArgumentError(QLKError, ValueError):
    """A value that the called function cannot accept (also a ValueError)."""


class ArgumentTypeError(QLKError, TypeError):
    """A value of the wrong type or dtype (also a TypeError)."""


class BackendError(QLKError, RuntimeError):
    """No backend can run a problem, or the forced one cannot (also a RuntimeError)."""


class CheckpointError(QLKError, ValueError):
    """A file that is truncated, foreign or inconsistent (also a ValueError)."""


def argument_error(op: str, argument: str, rule: str, got: object) -> ArgumentError:
    """Build `op: argument must be rule, got got`."""
    return ArgumentError(f"{op}: {argument} must be {rule}, got {got}")


def type_error(op: str, argument: str, rule: object, got: object) -> ArgumentTypeError:
    """Build the same message as a TypeError."""
    return ArgumentTypeError(f"{op}: {argument} must be {rule}, got {got}")
