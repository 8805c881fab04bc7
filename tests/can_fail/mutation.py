"""What a mutation is. To cover another kernel, add one to codecs.py, matmuls.py or calls.py."""

from __future__ import annotations

from dataclasses import dataclass

# Levels that CPUID does not show on every machine whose tests should cover them.
EMULATED = ("avx512_bf16", "amx")


@dataclass(frozen=True)
class Mutation:
    """One wrong kernel.

    Attributes:
        what: the fault, as the test's name.
        source: the file of csrc/kernels_cpu, or csrc/bindings, that is compiled.
        old, new: the change; `old` must occur exactly `count` times in the file.
        tests: the test function that must catch it, as FILE::NAME.
        isa: the instruction-set path to run it on, "" where tests have none; those of `EMULATED`
            run in a library that reports every level, with the twin of the tile unit.
        header: the file to change if it is not `source`, relative to csrc.
        count: how often `old` occurs.
    """

    what: str
    source: str
    old: str
    new: str
    tests: str
    isa: str = ""
    header: str | None = None
    count: int = 1

    @property
    def emulated(self) -> bool:
        """Whether it runs in the library that reports every level."""
        return self.isa in EMULATED

    @property
    def selection(self) -> list[str]:
        """Arguments of pytest: the test on the path; "avx512" alone, not "avx512_bf16"."""
        path = ["-k", f"[{self.isa}- or [{self.isa}]"] if self.isa else []
        return [self.tests, *path]
