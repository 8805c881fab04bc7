"""The kernel tests can fail: each mutation of a kernel's source must turn one of them red.

A mutation is a textual change of a copy of csrc. The changed source is compiled, linked with the
other objects of the last build into a library of its own, and the tests named beside the mutation
run against that library in a process of their own. The same tests must pass where nothing changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.can_fail import adapters_amx, calls, codecs, matmuls
from tests.can_fail.mutation import EMULATED, Mutation
from tests.native_library import (
    CSRC,
    EMULATED_AMX,
    EMULATED_SOURCES,
    FAST_TO_COMPILE,
    compile_kernel,
    link,
    run_tests,
    source_folder,
    why_no_emulated_amx,
    why_no_source_build,
)

MUTATIONS = (*codecs.MUTATIONS, *matmuls.MUTATIONS, *adapters_amx.MUTATIONS, *calls.MUTATIONS)


@pytest.fixture(autouse=True)
def require_a_source_build() -> None:
    if reason := why_no_source_build():
        pytest.skip(reason)


def build_mutant(mutation: Mutation, objects: dict[str, Path], folder: Path) -> Path:
    """The library with the changed source; `objects` are further replacements, unchanged."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc, ignore=shutil.ignore_patterns("*.cu"))
    changed = csrc / (mutation.header or f"{source_folder(mutation.source)}/{mutation.source}")
    text = changed.read_text()
    assert text.count(mutation.old) == mutation.count, f"{changed.name} no longer has it"
    changed.write_text(text.replace(mutation.old, mutation.new))
    flags = EMULATED_AMX if mutation.emulated else FAST_TO_COMPILE
    mutant = compile_kernel(mutation.source, csrc, flags, folder)
    return link({**objects, mutation.source: mutant}, folder / "libmutant.so")


def emulated_objects(folder: Path) -> dict[str, Path]:
    """The unchanged objects of the kernels on the twin of the tile unit."""
    folder.mkdir()
    return {name: compile_kernel(name, CSRC, EMULATED_AMX, folder) for name in EMULATED_SOURCES}


Outcome = Future[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Outcome]]:
    """What each selected mutation's tests said, by name: a compiler and a process of each, as many
    at a time as there are cores, started together."""
    chosen = {
        item.callspec.params["mutation"].what: item.callspec.params["mutation"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.function is test_a_wrong_kernel_turns_a_test_red
    }
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wants_twin = any(m.emulated for m in chosen.values()) and not why_no_emulated_amx()
        twin = pool.submit(emulated_objects, folder / "twin") if wants_twin else None

        def outcome(mutation: Mutation) -> subprocess.CompletedProcess[str]:
            own = folder / mutation.what
            own.mkdir()
            objects = twin.result() if mutation.emulated and twin is not None else {}
            done = run_tests(build_mutant(mutation, objects, own), mutation.selection)
            shutil.rmtree(own)
            return done

        # The twin's are last: they would hold up the others while its objects are compiled.
        order = sorted(chosen.values(), key=lambda mutation: mutation.emulated)
        found = {
            mutation.what: pool.submit(outcome, mutation)
            for mutation in order
            if not (mutation.emulated and why_no_emulated_amx())
        }
        yield found
        for future in found.values():
            future.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_wrong_kernel_turns_a_test_red(mutation: Mutation, outcomes: dict[str, Outcome]) -> None:
    if mutation.emulated and (reason := why_no_emulated_amx()):
        pytest.skip(reason)
    done = outcomes[mutation.what].result()
    if "skipped" in done.stdout and "passed" not in done.stdout and done.returncode == 0:
        pytest.skip(f"this machine has no {mutation.isa}")
    # 1: tests ran and failed. Anything else is a broken run or a fault that nothing noticed.
    assert done.returncode == 1, f"not caught\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "AssertionError" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_the_same_tests_pass_on_the_right_kernels(tmp_path: Path) -> None:
    plain = [mutation for mutation in MUTATIONS if not mutation.emulated]
    source = plain[0].source
    objects = {source: compile_kernel(source, CSRC, FAST_TO_COMPILE, tmp_path)}
    library = link(objects, tmp_path / "libright.so")
    done = run_tests(library, sorted({mutation.tests for mutation in plain}))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_same_tests_pass_on_the_right_emulated_kernels(tmp_path: Path) -> None:
    if reason := why_no_emulated_amx():
        pytest.skip(reason)
    library = link(emulated_objects(tmp_path / "twin"), tmp_path / "libright.so")
    names = sorted({mutation.tests for mutation in MUTATIONS if mutation.emulated})
    levels = " or ".join(f"[{isa}- or [{isa}]" for isa in EMULATED)
    done = run_tests(library, [*names, "-k", levels])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
