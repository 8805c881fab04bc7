"""Every CUDA source and device header compiles for every target that ships, without register
spills and within budgets of registers and instructions; needs no GPU."""

from __future__ import annotations

import re
import subprocess
from functools import cache, lru_cache
from pathlib import Path

import pytest

from tests.compile.cuda_sass import (
    NVCC,
    ROOT,
    Code,
    Kernel,
    Usage,
    code_of_source,
    compile_cubin,
    disassemble,
    disassembler,
    matches,
    usages,
    usages_of,
)
from tests.emulation.cuda.runner import build_for_gpu

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
KERNELS = ROOT / "csrc" / "kernels"
SOURCES = sorted(KERNELS.glob("*.cu"))
DEVICE_HEADERS = sorted((ROOT / "csrc" / "include").rglob("*.cuh"))
ARCHS = re.findall(r'"(\d+a?)"', SETUP.partition("\nCUDA_ARCHS = ")[2].partition("\n")[0])

# Registers of a thread: with 256 threads a block, two blocks an SM up to 128, three up to 80.
MOST_REGISTERS = {
    "dequantize": 64,
    "double_quantize": 64,
    "quantize": 128,
    "quantized_matmul_sm80": 128,
    # Of more ranks one block stays on an SM; fewer have budgets of their own below.
    "low_rank_gradients_sm80": 216,
    # With 384 threads a block. setmaxnreg gives those who multiply more.
    "quantized_matmul_sm90": 168,
}

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")


@pytest.fixture(scope="module")
def known_archs() -> set[str]:
    assert NVCC is not None
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return set(re.findall(r"compute_(\d+)", listed.stdout))


@cache
def compiled(stem: str, arch: str, folder: Path) -> Code:
    """A kernel's code, once for all tests."""
    return code_of_source(KERNELS / f"{stem}.cu", arch, folder)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_source_compiles(
    source: Path, arch: str, known_archs: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if arch.rstrip("a") not in known_archs:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    if source.stem.endswith("_sm90") and arch != "90a":
        pytest.skip("instructions of sm_90a alone")
    code = compiled(source.stem, arch, tmp_path_factory.getbasetemp())
    # What ptxas says where it serialises wgmmas, or ignores setmaxnreg.
    assert "Potential Performance Loss" not in code.said, code.said
    found = code.usages
    assert found, "no account of registers: spills would go unseen"
    assert [usage for usage in found if usage.spilled] == []
    most = MOST_REGISTERS.get(source.stem, 128)
    assert [usage for usage in found if usage.registers > most] == []


@pytest.mark.parametrize("header", DEVICE_HEADERS, ids=lambda path: path.stem)
def test_device_header_compiles_alone(header: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone.cu"
    source.write_text(f'#include "{header.relative_to(ROOT / "csrc" / "include")}"\n')
    done = compile_cubin(source, "80", tmp_path / "out.cubin")
    assert done.returncode == 0, done.stderr


def test_spills_are_seen(tmp_path: Path) -> None:
    """A kernel that indexes a local array at run time needs local memory, and that is reported."""
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void spilling(int* out, int n) {\n"
        "  int values[64];\n"
        "  for (int i = 0; i < 64; ++i) values[(i * n) & 63] = out[i] * n;\n"
        "  *out = values[n & 63];\n"
        "}\n"
    )
    cubin = tmp_path / "out.cubin"
    done = compile_cubin(source, "80", cubin)
    assert done.returncode == 0, done.stderr
    assert [usage.spilled for usage in usages(done.stderr)] == [True]
    assert [usage.spilled for usage in usages_of(cubin)] == [True]
    # Both accounts are the same, kernel by kernel.
    source = KERNELS / "dequantize.cu"
    done = compile_cubin(source, "80", cubin)
    ptxas, ours = usages(done.stderr), usages_of(cubin)
    assert sorted(map(str, ptxas)) == sorted(map(str, ours))


def test_broken_source_fails(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { undeclared = 1; }\n")
    assert compile_cubin(source, "80", tmp_path / "out.cubin").returncode != 0


# Machine code. Dtypes and token tiles by their place in the mangled names: DType 0 is fp32, 1 fp16,
# 2 bf16; Lb1E of quantize encodes against decoded scales; Li1E, Li2E, Li4E are 8, 16, 32 tokens.


@lru_cache(maxsize=8)
def machine_code(stem: str, arch: str, folder: Path) -> list[Kernel]:
    return disassemble(compiled(stem, arch, folder).cubin)


@pytest.fixture(params=["80", "90a"])
def code_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(stem, part of the mangled name) -> the kernels of that name for the architecture."""
    if disassembler() is None:
        pytest.skip("no nvdisasm: it comes with the CUDA toolkit and with Triton")

    def find(stem: str, part: str) -> list[Kernel]:
        kernels = machine_code(stem, request.param, tmp_path_factory.getbasetemp())
        found = [kernel for kernel in kernels if re.search(part, kernel.name)]
        assert found, f"no kernel {part} among {[kernel.name for kernel in kernels]}"
        return found

    return find


def test_dequantize_stores_16_bytes_and_decodes_in_few_instructions(code_of) -> None:
    # 32 elements of a lane at a time. 17.7 instructions an element are what the H200 can issue
    # while it moves an element's bytes at its copy bandwidth.
    elements = 32
    for dtype, stores in ((1, 4), (2, 4), (0, 8)):
        for kernel in code_of("dequantize", f"dequantize_kernelILNS_5DTypeE{dtype}"):
            assert kernel.count(r"STG\.E\.128") == stores
            assert kernel.count(r"ST\.E|LD\.E") == 0, "generic accesses"
            decoding = kernel.blocks_with(r"LDS|STG\.E\.128")
            assert matches(decoding, "LDS") >= elements, "not the blocks that decode"
            assert sum(decoding.values()) <= 10 * elements
            assert matches(decoding, "F2FP|F2F") <= (elements / 2 if dtype else 0)


def test_quantize_loads_16_bytes_and_encodes_in_few_instructions(code_of) -> None:
    elements = 32
    for dtype, loads in ((1, 4), (2, 4), (0, 8)):
        for kernel in code_of("quantize", f"DTypeE{dtype}ELb0E"):
            assert kernel.count(r"LDG\.E\S*128") >= loads
            encoding = kernel.blocks_with("LDS")
            # The root of the tree stays in a register: three more levels.
            assert 3 * elements <= matches(encoding, "LDS") <= 3 * elements + 8
            assert sum(encoding.values()) <= 24 * elements


def test_matmul_multiplies_on_tensor_cores_in_few_instructions(code_of) -> None:
    # At M = 1 an H200 can issue 3.9 instructions an element while it reads the weights; 1.44 are
    # the look-ups, products and scales alone. The loop takes a tile, 16 rows of 128 elements a
    # warp, for each of its stages; what copies the tiles to come, their scales and barriers are in
    # it as well. Lb0E has fp32 scales, Lb1E double-quantized ones.
    budgets = ((1, 4, 0, 1.87), (1, 4, 1, 2.05), (2, 4, 0, 2.2), (2, 4, 1, 2.37))
    for tokens, stages, nested, most in (*budgets, (4, 3, 0, 3.8), (4, 3, 1, 4.13)):
        for kernel in code_of("quantized_matmul_sm80", f"ELi{tokens}ELb{nested}E"):
            # The third size keeps its two chunks in a loop.
            chunks = 2 if tokens < 4 else 1
            products = stages * chunks * 4 * tokens
            loop = kernel.loop_with("HMMA", products)
            assert matches(loop, "HMMA") == products
            assert matches(loop, r"LDS\.128") == products / 2
            # 8 bytes of two rows a chunk, each looked up once; beside it nested scales, and what
            # the compiler puts before each copy.
            assert 0 <= matches(loop, r"LDS$") - stages * chunks * 16 <= 8 * stages
            # Each look-up's address by one instruction.
            assert matches(loop, "PRMT") == stages * chunks * 16
            elements = stages * chunks * 16 * 64
            assert sum(loop.values()) * 32 / elements <= most


def test_matmul_copies_16_bytes_asynchronously(code_of) -> None:
    for kernel in code_of("quantized_matmul_sm80", "quantized_matmul_sm80_kernel"):
        assert kernel.count(r"LDGSTS\S*\.128") == kernel.count("LDGSTS") >= 9


def test_matmul_of_hopper_decodes_while_it_multiplies(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # The loop takes 256 columns of a warp's 16 rows (units: as often of its tile's). While an H200
    # reads an element it can issue 3.9 instructions; while it multiplies one with 64 tokens, 4, and
    # with 128, 8. Two of each byte are its look-up, half of one is each token's scale a row.
    if disassembler() is None:
        pytest.skip("no nvdisasm: it comes with the CUDA toolkit and with Triton")
    kernels = machine_code("quantized_matmul_sm90", "90a", tmp_path_factory.getbasetemp())
    budgets = ((32, 1, 3.3), (32, 2, 2.85), (64, 1, 3.85), (64, 2, 3.15), (128, 1, 4.85))
    for tokens, units, most in (*budgets, (128, 2, 4.9)):
        found = [k for k in kernels if f"ELi{tokens}ELi{units}E" in k.name]
        assert len(found) == 2  # dtypes
        for kernel in found:
            parts = 2 if tokens * units > 128 else 1
            loop = kernel.loop_with("HGMMA", 16 * units * parts)
            assert matches(loop, "HGMMA") == 16 * units * parts
            assert matches(loop, "PRMT") == matches(loop, r"LDS$") == 64 * units
            assert matches(loop, r"LDS\.64") == 12 * units
            assert matches(loop, "FFMA") == 2 * tokens * units
            assert sum(loop.values()) / (128 * units) <= most
            for instruction in (r"UTMALDG\.2D", "UBLKCP", "ACQBULK"):
                assert kernel.count(instruction) == 1
            assert kernel.count("USETMAXREG") == 2
    (arrange,) = (k for k in kernels if "arrange_tokens" in k.name)
    assert arrange.count(r"STG\.E\.128") == 1
    assert arrange.count("PREEXIT") == 1


def test_gradients_multiply_on_tensor_cores_in_few_instructions(code_of) -> None:
    # The loop takes 16 tokens of a warp's 64 columns, or of 32 for both products of 64 ranks: where
    # that budget is twice another, it is for one pass instead of two. 14 instructions an element
    # are what an H200 can issue while it reads the 2 bytes of one; about half of those here run, as
    # rows go either by 16 bytes or by elements.
    budgets = ((16, 1, 0, 8.6), (16, 1, 1, 14.0), (16, 0, 1, 13.4))
    for ranks, with_gradient, with_u, most in (
        *budgets,
        (32, 1, 0, 9.5),
        (32, 1, 1, 16.7),
        (32, 0, 1, 15.4),
        (64, 1, 0, 11.8),
        (64, 1, 1, 31.6),
        (64, 0, 1, 16.3),
    ):
        part = f"ELi{ranks}ELb{with_gradient}ELb{with_u}E"
        for kernel in code_of("low_rank_gradients_sm80", part):
            tiles, products = ranks // 8, with_gradient + with_u
            steps = 2 if ranks == 64 and products == 2 else 4
            elements = 16 * 16 * steps
            loop = kernel.loop_with("HMMA", steps * tiles * products)
            assert matches(loop, "HMMA") == steps * tiles * products
            # Each step's elements once for either product, and left's two tiles at a time.
            assert matches(loop, "LDSM") == steps * products + tiles // 2 * with_gradient
            assert sum(loop.values()) * 32 / elements <= most
            assert kernel.count(r"LDGSTS\S*\.128") >= steps
            assert kernel.count("ATOM|RED") == 0, "sums in no fixed order"


def test_gradients_of_few_ranks_leave_room_for_two_blocks(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    found = compiled("low_rank_gradients_sm80", "80", tmp_path_factory.getbasetemp()).usages
    few = [usage for usage in found if "ELi16E" in usage.kernel]
    assert len(few) == 6
    assert [usage for usage in few if usage.registers > 128] == []
    more = [usage for usage in found if "ELi32E" in usage.kernel]
    assert len(more) == 6
    assert [usage for usage in more if usage.registers > 200] == []


def test_wrappers_of_sm90_compile_to_their_instructions(tmp_path: Path) -> None:
    source, cubin = ROOT / "tests/emulation/cuda/instructions_sm90.cu", tmp_path / "out.cubin"
    done = compile_cubin(source, "90a", cubin)
    assert done.returncode == 0, done.stderr
    assert [usage for usage in usages(done.stderr) if usage.spilled] == []
    # ptxas neither serialises wgmmas nor adds fences to them, and heeds setmaxnreg.
    assert "(C75" not in done.stderr, done.stderr
    if disassembler() is None:
        pytest.skip("no nvdisasm: it comes with the CUDA toolkit and with Triton")
    kernels = disassemble(cubin)
    products = [kernel for kernel in kernels if "wgmma_kernel" in kernel.name]
    assert [kernel.count("HGMMA") for kernel in products] == [4] * 18
    for part, instruction in (
        ("copy_tensor_kernel", r"UTMALDG\.2D"),
        ("copy_bulk_kernel", "UBLKCP"),
        ("register_budget_kernel", r"USETMAXREG\.TRY_ALLOC"),
        ("secondary_kernel", "ACQBULK"),
        ("primary_kernel", "PREEXIT"),
    ):
        (kernel,) = (kernel for kernel in kernels if part in kernel.name)
        assert kernel.count(instruction), f"{kernel.name} has no {instruction}"


@pytest.mark.slow
def test_the_runner_of_the_gpu_tests_builds() -> None:
    """tests/gpu/test_cuda_instructions.py compiles it for the GPU at hand; here for any."""
    assert build_for_gpu("80").exists()


def test_ptxas_report_is_read() -> None:
    report = (
        "ptxas info    : Compiling entry function 'good' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function 'bad' for 'sm_80'\n"
        "    8 bytes stack frame, 8 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 128 registers\n"
    )
    assert usages(report) == [Usage("good", 40, False), Usage("bad", 128, True)]
