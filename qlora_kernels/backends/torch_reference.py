"""The reference as a backend: lowest priority on every device, so that every problem has an
answer."""

from __future__ import annotations

from qlora_kernels import reference
from qlora_kernels.backends.registry import OPS, Problem, register_kernel

PRIORITY = 0


def _rejects(problem: Problem) -> str | None:
    return None


for _op in OPS:
    register_kernel(_op, "reference", priority=PRIORITY, rejects=_rejects)(
        getattr(reference, f"{_op}_reference")
    )
