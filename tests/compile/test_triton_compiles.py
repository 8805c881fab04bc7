"""Every Triton kernel, compiled for GPUs that are not there: no spills, wide loads, tensor cores in
use, decoding overlapped with products, and no more instructions per element than budgeted.

Runs on the installed Triton and, in a process of its own, on each other one that is found: those
that QLK_TEST_TRITONS names (folders to put first on the path), or .venv/triton-*.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kernels import env
from qlora_kernels.backends.triton.double_quantize import double_quantize_launches
from qlora_kernels.testing.triton_aot import Compiled, compile_launch
from tests.compile.triton_launches import FACTS, Case, cases, launches_of_one, meta, meta_weight

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="kernels are interpreted here")

ROOT = Path(__file__).resolve().parents[2]
# Shared memory that a program can have: 164, 228 and 228 KB an SM, 1 KB of them reserved.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
CASES = {(cc, case.name): case for cc in FACTS for case in cases(cc)}


def other_tritons() -> list[str]:
    """Folders with a Triton other than the one that is imported here."""
    named = os.environ.get("QLK_TEST_TRITONS")
    if named is not None:
        return [folder for folder in named.split(os.pathsep) if folder]
    return [str(path) for path in sorted((ROOT / ".venv").glob("triton-*"))]


@pytest.mark.parametrize(("capability", "name"), CASES, ids=lambda value: f"{value}")
def test_kernel_compiles_to_what_it_should(capability: int, name: str) -> None:
    case = CASES[capability, name]
    compiled = compile_launch(case.launch, capability)
    assert faults(case, compiled, capability) == []


def faults(case: Case, compiled: Compiled, capability: int) -> list[str]:
    """What the code of a case does not live up to."""
    found = []
    hot = compiled.hot_loop

    def require(holds: bool, otherwise: str) -> None:
        if not holds:
            found.append(otherwise)

    require(compiled.stack_bytes == 0, f"{compiled.stack_bytes} bytes of local memory")
    limit = SHARED_LIMIT[capability]
    require(compiled.shared_bytes <= limit, f"{compiled.shared_bytes} bytes of shared memory")
    loads = hot.narrow(("LDG.", "LDGSTS."))
    stores = compiled.everything.narrow(("STG.",))
    for what, narrow, most in (
        ("loads", loads, case.narrow_loads),
        ("stores", stores, case.narrow_stores),
    ):
        require(most is None or sum(narrow.values()) <= most, f"narrow {what}: {narrow}")
    if case.tensor_cores:
        # HMMA on sm_80, HGMMA (wgmma) or HMMA on sm_90, UTCHMMA (tcgen05) or HMMA on sm_100.
        products = sum(n for op, n in hot.instructions.items() if "MMA" in op.split(".")[0])
        require(products > 0, "no tensor-core instruction in the hot loop")
    if case.permutes is not None:
        # Of the eight elements that a word of codes has.
        permutes = hot.count("PRMT") * compiled.num_warps * 32 * 8 / case.elements
        require(permutes >= case.permutes, f"{permutes:.1f} permutations for eight elements")
    if case.overlaps and capability == 90:
        require(hot.count("HGMMA") > 0, "no wgmma in the hot loop")
        waits = compiled.wgmma_waits()
        require(bool(waits) and min(waits) >= 1, f"waits for its products: {waits}")
    cost, budget = compiled.per_element(case.elements), case.budget[capability]
    require(cost <= budget, f"{cost:.2f} instructions per element, budget {budget}")
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("folder", other_tritons(), ids=lambda path: Path(path).name)
def test_on_another_triton(folder: str) -> None:
    version = "import triton; print(triton.__version__)"
    variables = {**os.environ, "PYTHONPATH": folder, "QLK_TEST_TRITONS": ""}
    command = [sys.executable, "-c", version]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() != triton.__version__, f"{folder} does not come first on the path"
    # sm_90 alone, and its products and largest codecs: where the two differ, they do there.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    hard = "few or forward or backward or dropout or up-gradients or sum or 8-nested"
    command += ["-k", f"(90- and ({hard})) or serial or narrow"]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


ONES = launches_of_one()


@pytest.mark.parametrize("index", range(len(ONES)), ids=lambda i: f"{i}-{ONES[i].kernel}")
def test_sizes_of_one_compile(index: int) -> None:
    assert compile_launch(ONES[index], 90).stack_bytes == 0


def some_case(name: str, capability: int = 90) -> Case:
    return CASES[capability, name]


def test_spills_are_seen() -> None:
    launch = double_quantize_launches(
        meta(4096), meta(256), 256, meta(4096, dtype=torch.uint8), meta(16), meta(1)
    )[0]
    launch = dataclasses.replace(launch, arguments=launch.arguments | {"TILE": 4096})
    assert compile_launch(launch, 90).stack_bytes > 0


def test_narrow_loads_are_seen() -> None:
    # 4128 / 2 is no multiple of 32 but of 16; 4104 / 2 is none of 16.
    case = some_case("forward-M64-absmax")
    arguments = case.launch.arguments | {"codes_stride": 2052}
    narrow = dataclasses.replace(case, launch=dataclasses.replace(case.launch, arguments=arguments))
    found = faults(narrow, compile_launch(narrow.launch, 90), 90)
    assert any("narrow loads" in fault for fault in found)


def test_a_blown_budget_is_seen() -> None:
    case = some_case("dropout")
    strict = dataclasses.replace(case, budget={90: 5.0})
    assert any("budget 5.0" in f for f in faults(strict, compile_launch(case.launch, 90), 90))


def test_a_serial_loop_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Ŵ as the right operand, Triton waits for every product before it decodes on."""
    source = """
import triton, triton.language as tl
@triton.jit
def kernel(x_ptr, codes_ptr, table_ptr, y_ptr, K):
    table = tl.load(table_ptr + tl.arange(0, 16))
    n, m, k = tl.arange(0, 128), tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros((64, 128), tl.float32)
    for first in range(0, K, 64):
        codes = tl.load(codes_ptr + n[:, None] * K + first + k[None, :]).to(tl.int32)
        weight = tl.gather(table, codes.reshape(8192), 0).reshape(128, 64)
        x = tl.load(x_ptr + m[:, None] * K + first + k[None, :])
        acc = tl.dot(x, weight.to(tl.bfloat16).T, acc)
    tl.store(y_ptr + m[:, None] * 128 + n[None, :], acc)
"""
    (tmp_path / "serial_kernel.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    import serial_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = ("x_ptr", "codes_ptr", "table_ptr", "y_ptr", "K")
    signature = dict(zip(names, ("*bf16", "*u8", "*fp32", "*fp32", "i32"), strict=True))
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    kernel = triton.compile(
        ASTSource(serial_kernel.kernel, signature, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
    )
    waits = Compiled(kernel, 4).wgmma_waits()
    assert waits and min(waits) == 0


def test_meta_weights_have_the_real_sizes() -> None:
    weight = meta_weight(33, 1001)
    assert weight.codes.numel() == (33 * 1001 + 1) // 2
    assert weight.scale_codes is not None and weight.scale_codes.numel() == -(-33 * 1001 // 64)
