"""`bench.run --base REV`: measure another commit in a worktree and this tree, in turns.

Both sides run this tree's bench/ and testing/. The other commit's library is compiled where its
C++ differs, and is this tree's where it does not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import compare
from bench.machine import git
from qlora_kernels.errors import argument_error

ROOT = Path(__file__).resolve().parents[1]
# What both sides take from this tree: it measures, and is not what is measured.
MEASURING = ("bench", "qlora_kernels/testing")
NATIVE = ("csrc", "setup.py")


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A throwaway checkout of a revision.

    Raises:
        ArgumentError: git does not know it.
    """
    try:
        commit = git("rev-parse", "--verify", f"{revision}^{{commit}}", where=ROOT)
    except subprocess.CalledProcessError as error:
        raise argument_error("bench", "base", "a commit", repr(revision)) from error
    with tempfile.TemporaryDirectory(prefix="bench-base-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit, where=ROOT)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), where=ROOT)


def prepare(tree: Path) -> dict[str, str]:
    """Give the worktree this tree's bench and a library; returns variables to run it with."""
    for part in MEASURING:
        shutil.rmtree(tree / part, ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / part, tree / part, ignore=ignore)
    commit = git("rev-parse", "HEAD", where=tree)
    same = subprocess.run(["git", "diff", "--quiet", commit, "--", *NATIVE], cwd=ROOT, check=False)
    built = ROOT / "qlora_kernels" / "libqlora_kernels.so"
    if same.returncode == 0 and built.exists():
        return {"QLK_LIBRARY": str(built)}
    print("base: compiling its library", file=sys.stderr)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True
    )
    return {}


def without_base(arguments: Sequence[str]) -> list[str]:
    """The command line of one side: without --base, --repeats, --out and --strict."""
    kept, skip = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if skip:
            skip = False
        elif name in ("--base", "--repeats", "--out"):
            skip = not value
        elif name != "--strict":
            kept.append(argument)
    return kept


def run_side(tree: Path, arguments: Sequence[str], out: Path, variables: Mapping[str, str]) -> None:
    """One run of one side; its table is not shown."""
    command = [sys.executable, "-m", "bench.run", *arguments, "--out", str(out)]
    done = subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    # 1: a wrong result, which the comparison tells by name.
    if done.returncode not in (0, 1) or not list(out.rglob("*.json")):
        raise argument_error("bench", "base", "able to run this bench", done.stderr[-2000:])


def main(arguments: Sequence[str], options: argparse.Namespace) -> int:
    """Measure base and head in turns, print the comparison; returns its exit status."""
    if options.repeats < 1:
        raise argument_error("bench", "repeats", "1 or more", options.repeats)
    rest = without_base(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as folder:
        out = Path(folder)
        with worktree(options.base) as tree:
            variables = prepare(tree)
            for i in range(options.repeats):
                print(f"base: run {i + 1} of {options.repeats}", file=sys.stderr)
                run_side(tree, rest, out / "before" / str(i), variables)
                run_side(ROOT, rest, out / "after" / str(i), {})
        return compare.report(out / "before", out / "after")
