"""What a person sees while cells are computed: a bar, or ten lines where stderr is no terminal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import TracebackType

import torch
from tqdm import tqdm

from qlora_kernels.errors import QLKError
from qlora_kernels.finetune.console import exit_code_of, say
from qlora_kernels.finetune.interrupt import Interrupted

__all__ = ["Bar", "run", "say"]


class Bar:
    """Progress over ``total`` cells of ``what``; a context manager."""

    def __init__(self, what: str, total: int, unit: str = "cell") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.line_every = max(1, -(-total // 10))
        self.bar = tqdm(total=total, desc=what, unit=unit, mininterval=0.5, disable=None)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.bar.close()

    def step(self, doing: str = "", cells: int = 1) -> None:
        """Some cells are done, the last of them ``doing``."""
        before, self.done = self.done, self.done + cells
        self.bar.set_postfix_str(doing, refresh=False)
        self.bar.update(cells)
        if self.bar.disable and self.done // self.line_every > before // self.line_every:
            say(f"{self.what}: {self.done} of {self.total} {self.unit}s")


def run(action: Callable[[], None]) -> int:
    """Run a command and return its exit status, errors as one line: see `exit_code_of`."""

    def told() -> None:
        try:
            action()
        except KeyboardInterrupt as stopped:
            message = "stopped; the same command goes on from there"
            raise Interrupted(message, signal.SIGINT) from stopped
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise QLKError("lab: no more memory; fewer --texts or --layers need less") from error

    return exit_code_of(told)
