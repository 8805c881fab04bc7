"""Runs pytest again and again in processes that need not import torch: each is a fork of one that
has. Run as a program, it serves a Unix socket until its stdin ends; see `run_pytest`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class _Server:
    """The process, and where it listens."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.address = str(Path(self._folder.name) / "socket")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        # Bytecode is kept from run to run: most of the start is imports.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(ROOT / "build" / "bytecode")
        # Waiting threads sleep: another test may be running beside this one.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        command = [sys.executable, "-m", "tests.pytest_server", self.address]
        # Its stdin ends with this process, however that ends.
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the server did not start"


@functools.cache
def _server() -> _Server:
    return _Server()


def run_pytest(
    arguments: Sequence[str], variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, which has imported torch and nothing of the project, with
    environment variables; stdout and stderr are both in its stdout."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(_server().address)
        client.sendall(json.dumps([list(arguments), dict(variables)]).encode() + b"\n")
        with client.makefile("rb") as stream:
            output, _, status = stream.read().decode(errors="replace").rpartition("\0")
    return subprocess.CompletedProcess(list(arguments), int(status), output, "")


def _answer(connection: socket.socket) -> None:
    """One request: what pytest writes, then a zero byte and its status."""
    with connection.makefile("rb") as stream:
        arguments, variables = json.loads(stream.readline())
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(connection.fileno(), number)
        os.environ.update(variables)
        import pytest

        code = 70
        with contextlib.suppress(SystemExit):
            code = int(pytest.main(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(f"\0{status}".encode())


def main(address: str) -> None:
    """Serve, each request in a fork, until stdin ends."""
    import pytest  # noqa: F401
    import torch  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for the forks below.
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
