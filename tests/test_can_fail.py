"""The kernel tests can fail: each mutation of a kernel's source must turn one of them red.

A mutation is a textual change of a copy of csrc. The changed source is compiled, linked with the
other objects of the last build into a library of its own, and the tests named beside the mutation
run against that library in a process of their own. The same tests must pass where nothing changed.

To cover another kernel, add a `Mutation`: its text must occur exactly `count` times in the file.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINK_COMMAND = ROOT / "build" / "native" / "link.txt"
# As setup.py compiles, but for -O1, which halves the time and changes no result.
COMPILE_FLAGS = ["-O1", "-std=c++20", "-fPIC", "-fno-math-errno", "-ffp-contract=off"]

QUANTIZE = "tests/backends/test_cpu_quantize.py"
DOUBLE_QUANTIZE = "tests/backends/test_cpu_double_quantize.py"
DEQUANTIZE = "tests/backends/test_cpu_dequantize.py"


@dataclass(frozen=True)
class Mutation:
    """One wrong kernel.

    Attributes:
        what: the fault, as the test's name.
        source: the file of csrc/kernels_cpu that is compiled.
        old, new: the change.
        tests: the test function that must catch it, as FILE::NAME.
        isa: the instruction-set path to run it on.
        header: the file to change if it is not `source`, relative to csrc.
        count: how often `old` occurs.
    """

    what: str
    source: str
    old: str
    new: str
    tests: str
    isa: str
    header: str | None = None
    count: int = 1


MUTATIONS = (
    Mutation(
        "quantize_swaps_nibbles",
        "quantize_avx512.cpp",
        "_mm512_set1_epi16(0x0110)",
        "_mm512_set1_epi16(0x1001)",
        f"{QUANTIZE}::test_quantize_takes_any_table",
        "avx512",
    ),
    Mutation(
        "quantize_swaps_nibbles_portably",
        "quantize.cpp",
        "static_cast<uint8_t>(high << 4 | low)",
        "static_cast<uint8_t>(low << 4 | high)",
        f"{QUANTIZE}::test_quantize_takes_any_table",
        "portable",
    ),
    Mutation(
        "quantize_sends_ties_up",
        "quantize_avx512.cpp",
        "_CMP_GT_OQ",
        "_CMP_GE_OQ",
        f"{QUANTIZE}::test_quantize_is_exact_on_and_around_boundaries",
        "avx512",
        count=4,
    ),
    Mutation(
        "quantize_sends_ties_up_in_avx2",
        "quantize_avx2.cpp",
        "_CMP_GT_OQ",
        "_CMP_GE_OQ",
        f"{QUANTIZE}::test_quantize_is_exact_on_and_around_boundaries",
        "avx2",
        count=4,
    ),
    Mutation(
        "quantize_drops_the_tail",
        "quantize.cpp",
        "if (full_blocks * p.block_size < p.numel) quantize_tail",
        "if (p.numel < 0) quantize_tail",
        f"{QUANTIZE}::test_quantize_equals_reference",
        "avx512",
    ),
    Mutation(
        "quantize_divides_by_denormals",
        "quantize.cpp",
        "1.0f / std::max(absmax, kSmallestNormal)",
        "1.0f / absmax",
        f"{QUANTIZE}::test_quantize_honours_denormals",
        "avx512",
    ),
    Mutation(
        "quantize_hides_infinities",
        "quantize.cpp",
        "return std::isfinite(value) ?",
        "return !std::isnan(value) ?",
        f"{QUANTIZE}::test_quantize_marks_only_the_block_that_is_not_finite",
        "avx512",
    ),
    Mutation(
        "quantize_ignores_the_sign_of_a_decoded_scale",
        "quantize.cpp",
        "std::copysign(1.0, static_cast<double>(scale))",
        "1.0",
        f"{QUANTIZE}::test_quantize_against_decoded_scales_breaks_exact_ties_downwards",
        "portable",
    ),
    Mutation(
        "double_quantize_sends_ties_up",
        "double_quantize_x86.cpp",
        "_CMP_NGE_UQ",
        "_CMP_NGT_UQ",
        f"{DOUBLE_QUANTIZE}::test_double_quantize_is_exact_on_and_around_midpoints",
        "avx512",
        count=3,
    ),
    Mutation(
        "double_quantize_sums_in_plain_fp64",
        "double_quantize.cpp",
        "low += (high - (sum - shifted)) + (value - shifted);",
        "",
        f"{DOUBLE_QUANTIZE}::test_double_quantize_sums_exactly",
        "avx2",
    ),
    Mutation(
        "dequantize_fuses_the_scale_decode",
        "dequantize_avx512.cpp",
        "_mm512_add_ps(_mm512_mul_ps(value, scale), offset)",
        "_mm512_fmadd_ps(value, scale, offset)",
        f"{DEQUANTIZE}::test_dequantize_decodes_scales_with_two_roundings",
        "avx512",
    ),
    Mutation(
        "dequantize_takes_the_neighbours_scale",
        "dequantize.cpp",
        "decode_scales(weight.scales, block, std::max",
        "decode_scales(weight.scales, block / 2 * 2, std::max",
        f"{DEQUANTIZE}::test_dequantize_into_rows_that_are_apart",
        "avx2",
    ),
    Mutation(
        "dequantize_ignores_the_row_stride",
        "dequantize.cpp",
        "out + r * p.row_stride * decoder.element_bytes",
        "out + r * weight.cols * decoder.element_bytes",
        f"{DEQUANTIZE}::test_dequantize_into_rows_that_are_apart",
        "avx512",
    ),
    Mutation(
        "dequantize_flushes_denormals",
        "dequantize_avx512_bf16.cpp",
        "return 0x1p-125f / smallest;",
        "return 0.0f;",
        f"{DEQUANTIZE}::test_dequantize_of_every_byte_and_edge_scale",
        "avx512_bf16",
    ),
    Mutation(
        "dequantize_rounds_ties_up",
        "dequantize_avx512.cpp",
        "_mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))",
        "_mm512_set1_epi32(0x8000)",
        f"{DEQUANTIZE}::test_dequantize_rounds_to_nearest_even",
        "avx512",
        header="include/qlk/simd_avx512.h",
    ),
)


def build_library(folder: Path, mutation: Mutation | None, source: str) -> Path:
    """Link the last build's objects anew, `source` compiled from a copy that holds the mutation."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("*.cu"))
    if mutation is not None:
        changed = csrc / (mutation.header or f"kernels_cpu/{mutation.source}")
        text = changed.read_text()
        assert text.count(mutation.old) == mutation.count, f"{changed.name} no longer has it"
        changed.write_text(text.replace(mutation.old, mutation.new))
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    compiled = folder / "changed.o"
    run(
        [
            *compiler,
            *COMPILE_FLAGS,
            f"-I{csrc / 'include'}",
            "-c",
            str(csrc / "kernels_cpu" / source),
            "-o",
            str(compiled),
        ]
    )
    link = shlex.split(LINK_COMMAND.read_text())
    stem = f"kernels_cpu-{source}-"
    replaced = [str(compiled) if Path(word).name.startswith(stem) else word for word in link]
    assert replaced != link, f"the last build has no object of {source}: run `make build`"
    library = folder / "libmutant.so"
    run([*replaced, "-o", str(library)])
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def run_tests(library: Path, selected: list[str]) -> subprocess.CompletedProcess[str]:
    """pytest on `selected` (arguments) in a process that loads `library`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["QLK_LIBRARY"] = str(library)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *selected]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def require_a_source_build() -> None:
    if not LINK_COMMAND.exists():
        pytest.skip("needs the objects of a build in this tree (`make build`)")


def selection(mutation: Mutation) -> list[str]:
    """The mutation's test on its path; "avx512" alone, not "avx512_bf16"."""
    return [mutation.tests, "-k", f"[{mutation.isa}- or [{mutation.isa}]"]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_wrong_kernel_turns_a_test_red(mutation: Mutation, tmp_path: Path) -> None:
    library = build_library(tmp_path, mutation, mutation.source)
    done = run_tests(library, selection(mutation))
    if "skipped" in done.stdout and "passed" not in done.stdout and done.returncode == 0:
        pytest.skip(f"this machine has no {mutation.isa}")
    # 1: tests ran and failed. Anything else is a broken run or a fault that nothing noticed.
    assert done.returncode == 1, f"not caught\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "AssertionError" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted({mutation.source for mutation in MUTATIONS})[:1])
def test_the_same_tests_pass_on_the_right_kernel(source: str, tmp_path: Path) -> None:
    library = build_library(tmp_path, None, source)
    names = sorted({mutation.tests for mutation in MUTATIONS})
    done = run_tests(library, names)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
