"""The kernel registry: which function computes an op for a problem, and why the others were passed
over.

Sits inside the torch ops: `select` runs per call on plain numbers, so nothing of it is traced or
compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from qlora_kernels import env
from qlora_kernels.env import BACKEND_KEY, KNOWN
from qlora_kernels.errors import BackendError, argument_error

OPS = (
    "quantize",
    "double_quantize",
    "dequantize",
    "dequantize_many",
    "quantized_matmul",
    "quantized_matmul_backward_input",
    "qlora_linear",
    "qlora_linear_backward",
    "qlora_group",
    "qlora_group_backward",
    "dropout",
)

# Backends of products alone. While one is forced, an op that it has no kernel of goes by priority:
# what such an op gives is the same bits on every backend.
PRODUCTS_ONLY = ("dense",)


class Problem(NamedTuple):
    """What a choice may depend on. Sizes that an op does not have are 0.

    dtype: of the weight for quantize, of the result for dequantize, of x for the matmuls.
    tokens M, out_features N, in_features K, rank R; for the codecs K is the number of elements.
    """

    op: str
    device_type: str
    dtype: torch.dtype
    tokens: int = 0
    out_features: int = 0
    in_features: int = 0
    rank: int = 0
    block_size: int = 64
    double_quant: bool = False
    batch_invariant: bool = False


Rejects = Callable[[Problem], "str | None"]
PathOf = Callable[[Problem], str]


@dataclass(frozen=True)
class KernelEntry:
    """One way to compute one op.

    Attributes:
        op: one of `OPS`.
        backend: "name" or "name:variant", e.g. "cpu:avx512".
        priority: the highest one that does not reject wins.
        rejects: problem -> reason, or None if the kernel can run it.
        available: () -> reason why it cannot run on this machine at all, or None.
        fn: the kernel's Python entry.
        path: problem it can run -> the way it takes inside, in words; None: it has one way.
    """

    op: str
    backend: str
    priority: int
    rejects: Rejects
    available: Callable[[], str | None]
    fn: Callable[..., Any]
    path: PathOf | None = None

    def reason_against(self, problem: Problem) -> str | None:
        """Why this entry cannot run `problem` here, or None."""
        return self.available() or self.rejects(problem)

    def matches(self, backend: str) -> bool:
        """Whether a forced backend name means this entry: "cpu" means every "cpu:…"."""
        return self.backend == backend or self.backend.split(":")[0] == backend


Cached = TypeVar("Cached", bound="functools._lru_cache_wrapper[Any]")

_ENTRIES: dict[str, list[KernelEntry]] = {op: [] for op in OPS}
_forced: ContextVar[str | None] = ContextVar("qlk_backend", default=None)
_forgotten: list[Callable[[], None]] = []


def always_available() -> str | None:
    """For kernels that need nothing of the machine."""
    return None


def register_kernel(
    op: str,
    backend: str,
    *,
    priority: int,
    rejects: Rejects,
    available: Callable[[], str | None] = always_available,
    path: PathOf | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as the kernel of `op` for `backend`; see `KernelEntry`.

    Raises:
        ArgumentError: unknown op, or the (op, backend) pair is taken.
    """
    if op not in _ENTRIES:
        raise argument_error("register_kernel", "op", f"one of {OPS}", repr(op))
    if any(entry.backend == backend for entry in _ENTRIES[op]):
        raise argument_error("register_kernel", "backend", f"new for {op}", repr(backend))

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        _ENTRIES[op].append(KernelEntry(op, backend, priority, rejects, available, fn, path))
        _ENTRIES[op].sort(key=lambda entry: -entry.priority)
        for forget in _forgotten:
            forget()
        return fn

    return decorate


def entries(op: str) -> list[KernelEntry]:
    """All kernels of `op`, highest priority first."""
    if op not in _ENTRIES:
        raise argument_error("entries", "op", f"one of {OPS}", repr(op))
    return list(_ENTRIES[op])


def nothing_forced() -> bool:
    """`forced_backend() == "auto"`, in less time: it is on the path of every inference call."""
    forced = _forced.get()
    if forced is not None:
        return forced == "auto"
    return BACKEND_KEY not in KNOWN or env.backend() == "auto"


def known_backends() -> list[str]:
    """Names that can be forced, sorted."""
    names = {entry.backend for listed in _ENTRIES.values() for entry in listed}
    return sorted(names | {name.split(":")[0] for name in names})


def forced_backend() -> str:
    """The backend in force: the innermost `backend(...)`, else QLK_BACKEND, else "auto"."""
    return _forced.get() or env.backend()


def check_backend(name: str) -> str:
    """Return `name` if it can be forced, else raise ArgumentError."""
    if name != "auto" and name not in known_backends():
        raise argument_error("backend", "name", f'"auto" or one of {known_backends()}', repr(name))
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every op called inside: `with qlora_kernels.backend("cpu:avx2"): …`.

    A forced backend that cannot run a problem raises BackendError; "auto" restores the choice by
    priority.

    Raises:
        ArgumentError: no kernel of that name is registered.
    """
    token = _forced.set(check_backend(name))
    try:
        yield
    finally:
        _forced.reset(token)


def _in_force(op: str, forced: str) -> str:
    """What a forced backend means for an op; see `PRODUCTS_ONLY`."""
    left = forced in PRODUCTS_ONLY and not any(entry.matches(forced) for entry in _ENTRIES[op])
    return "auto" if left else forced


def forgotten_when_registering(cached: Cached) -> Cached:
    """Decorator of a cached function that depends on which kernels there are."""
    _forgotten.append(cached.cache_clear)
    return cached


@forgotten_when_registering
@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str) -> KernelEntry:
    forced = _in_force(problem.op, check_backend(forced))
    reasons = []
    for entry in _ENTRIES[problem.op]:
        if forced != "auto" and not entry.matches(forced):
            continue
        reason = entry.reason_against(problem)
        if reason is None:
            return entry
        reasons.append(f"{entry.backend}: {reason}")
    what = "no backend can" if forced == "auto" else f"the forced backend {forced!r} cannot"
    raise BackendError(
        f"{problem.op}: {what} run this problem ({_describe(problem)}): "
        + ("; ".join(reasons) or "it has no such kernel")
    )


def select(problem: Problem) -> KernelEntry:
    """The kernel that runs `problem` now.

    Raises:
        BackendError: nothing registered can, or the forced backend cannot; the message carries
        every reason.
    """
    return _choose(problem, "auto" if nothing_forced() else forced_backend())


def explain_problem(problem: Problem) -> str:
    """One line per candidate, in order: chosen, and by which path; able; or why it was passed
    over."""
    forced = _in_force(problem.op, forced_backend())
    lines = [f"{problem.op} ({_describe(problem)}), backend {forced}:"]
    chosen = False
    for entry in _ENTRIES[problem.op]:
        reason = entry.reason_against(problem)
        if reason is None and forced != "auto" and not entry.matches(forced):
            reason = f"{forced!r} is forced"
        if reason is not None:
            verdict = f"passed over: {reason}"
        elif chosen:
            verdict = "able, lower priority"
        else:
            verdict, chosen = "chosen", True
            if entry.path is not None:
                verdict = f"chosen, path {entry.path(problem)}"
        lines.append(f"  {entry.backend:<16} {verdict}")
    return "\n".join(lines)


def _describe(problem: Problem) -> str:
    named = {
        "M": problem.tokens,
        "N": problem.out_features,
        "K": problem.in_features,
        "R": problem.rank,
    }
    sizes = " ".join(f"{name}={size}" for name, size in named.items() if size)
    dtype = str(problem.dtype).removeprefix("torch.")
    store = "double-quantized" if problem.double_quant else "fp32 scales"
    return f"{problem.device_type} {dtype} {sizes} block_size={problem.block_size}, {store}"
