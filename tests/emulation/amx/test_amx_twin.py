"""Each primitive of the twin of the AMX tile unit, from the instruction's definition.

The oracle works on whole numbers and fractions: Intel SDM, volume 2, "Operation" of TILELOADD,
TILESTORED, TILEZERO, LDTILECFG, TILERELEASE and TDPBF16PS. Where the machine has AMX, its own tile
unit takes the same tests.
"""

from __future__ import annotations

import ctypes
import math
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from qlora_kernels.backends.cpu.common import ISA_NAMES, machine_isa
from tests.native_library import CSRC, EMULATED_AMX, FAST_TO_COMPILE, compiler, run

SOURCE = Path(__file__).with_name("twin_primitives.cpp")
INCLUDE = f"-I{CSRC / 'include'}"
TILE = (16, 64)


@pytest.fixture(scope="module", params=["twin", "machine"])
def unit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The primitives as functions of a library."""
    if machine_isa() < ISA_NAMES.index("avx512"):
        pytest.skip("the AMX kernels and their twin are written for machines with AVX-512")
    if request.param == "machine" and machine_isa() < ISA_NAMES.index("amx"):
        pytest.skip("this machine has no AMX")
    return ctypes.CDLL(str(build(request.param, tmp_path_factory.mktemp(request.param))))


def build(which: str, folder: Path) -> Path:
    library = folder / f"lib{which}.so"
    flags = EMULATED_AMX if which == "twin" else FAST_TO_COMPILE
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [*compiler(), *flags, *warnings, INCLUDE, "-shared", str(SOURCE), "-o", str(library)]
    run(command)
    return library


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def random_tile(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, TILE, dtype=np.uint8)


@pytest.mark.parametrize("strides", [(64, 64), (80, 64), (64, 200), (256, 96)])
def test_load_and_store_move_16_rows_of_64_bytes(
    unit: ctypes.CDLL, strides: tuple[int, int]
) -> None:
    source = np.random.default_rng(1).integers(0, 256, (16, strides[0]), dtype=np.uint8)
    target = np.full((16, strides[1]), 7, dtype=np.uint8)
    unit.twin_copy(
        address(source), ctypes.c_int64(strides[0]), address(target), ctypes.c_int64(strides[1])
    )
    assert (target[:, :64] == source[:, :64]).all()
    assert (target[:, 64:] == 7).all(), "something beside the rows was written"


def test_zero_clears_one_tile_alone(unit: ctypes.CDLL) -> None:
    source, targets = random_tile(), np.full((3, *TILE), 7, dtype=np.uint8)
    unit.twin_zero(address(source), address(targets))
    assert not targets[1].any()
    assert (targets[0] == source).all() and (targets[2] == source).all()


def test_a_session_begins_with_zero_tiles(unit: ctypes.CDLL) -> None:
    targets = np.full((2, *TILE), 7, dtype=np.uint8)
    unit.twin_fresh(address(random_tile()), address(targets))
    assert not targets.any()


def test_a_tile_outside_a_session_is_a_fault(tmp_path: Path) -> None:
    if machine_isa() < ISA_NAMES.index("avx512"):
        pytest.skip("the AMX kernels and their twin are written for machines with AVX-512")
    library = build("twin", tmp_path)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).twin_use_without_session(bytes(1024))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGABRT
    assert "tile 0 was used outside a Session" in done.stderr


SMALLEST = Fraction(1, 2**126)


def flush(value: float) -> float:
    """Denormals are zeros of their sign."""
    return math.copysign(0.0, value) if abs(value) < SMALLEST else value


def to_fp32(value: Fraction) -> float:
    """Round to nearest even in fp32; a tiny result becomes 0, one that is too large infinite."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    exponent += (abs(value) >= Fraction(2) ** (exponent + 1)) - (
        abs(value) < Fraction(2) ** exponent
    )
    unit = Fraction(2) ** (exponent - 23)
    rounded = round(value / unit) * unit  # Python's round takes ties to even.
    if abs(rounded) >= Fraction(2) ** 128:
        return math.copysign(math.inf, rounded)
    return float(rounded) if abs(rounded) >= SMALLEST else math.copysign(0.0, rounded)


def add(a: float, b: float) -> float:
    """a + b in fp32."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    exact = Fraction(a) + Fraction(b)
    return to_fp32(exact) if exact else a + b


def multiply_add(a: float, b: float, c: float) -> float:
    """a · b + c in fp32 with one rounding."""
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return to_fp32(exact) if exact else a * b + c


def tdpbf16ps(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The definition: c fp32 [16,16], a and b bf16 values [16,32] held in fp32, b in pairs."""
    result = np.empty_like(c)
    c, a, b = c.tolist(), a.tolist(), b.tolist()
    for m in range(16):
        for n in range(16):
            even = odd = 0.0
            for k in range(16):
                even = multiply_add(flush(a[m][2 * k]), flush(b[k][2 * n]), even)
                odd = multiply_add(flush(a[m][2 * k + 1]), flush(b[k][2 * n + 1]), odd)
            result[m, n] = add(flush(c[m][n]), add(even, odd))
    return result


def run_multiply(unit: ctypes.CDLL, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c + a · b by the primitive; a and b are bf16 values held in fp32."""
    words = [np.ascontiguousarray(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
    kept = [w.copy() for w in words]
    result = c.copy()
    unit.twin_multiply_once(address(result), address(words[0]), address(words[1]))
    assert (words[0] == kept[0]).all() and (words[1] == kept[1]).all(), "an operand has changed"
    return result


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 values cut to bf16."""
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), (np.argwhere(~same)[0], got[~same][0], expected[~same][0])


@pytest.mark.parametrize("spread", [0, 3, 20])
def test_multiply_is_the_definition_bit_for_bit(unit: ctypes.CDLL, spread: int) -> None:
    # `spread` binades: the sums round at every step.
    rng = np.random.default_rng(spread)

    def values(*shape: int) -> np.ndarray:
        scale = np.exp2(rng.integers(-spread, spread + 1, shape).astype(np.float32))
        return rng.standard_normal(shape).astype(np.float32) * scale

    a, b, c = bf16(values(16, 32)), bf16(values(16, 32)), values(16, 16)
    assert_same_bits(run_multiply(unit, c, a, b), tdpbf16ps(c, a, b))


def test_multiply_sums_even_and_odd_halves_apart(unit: ctypes.CDLL) -> None:
    # 1 + 2^-24 + 2^-24 is 1 when added one after the other, and more when 2^-23 is formed first.
    a = np.zeros((16, 32), dtype=np.float32)
    b = np.zeros((16, 32), dtype=np.float32)
    a[:, 0] = a[:, 1] = 1.0
    b[0, 0::2] = b[0, 1::2] = 2.0**-24
    c = np.ones((16, 16), dtype=np.float32)
    assert (run_multiply(unit, c, a, b) == 1 + 2.0**-23).all()
    # Likewise two steps of k: both belong to the even half.
    a[:, 1], a[:, 2] = 0.0, 1.0
    b[1, 0::2] = 2.0**-24
    assert (run_multiply(unit, c, a, b) == 1 + 2.0**-23).all()


def test_multiply_treats_denormals_as_zero(unit: ctypes.CDLL) -> None:
    rng = np.random.default_rng(5)
    tiny = bf16(rng.choice([2.0**-127, -(2.0**-130), 2.0**-126, 1.0, -1.0], (16, 32)))
    other = bf16(rng.choice([2.0**-127, 2.0**-60, 1.0, 1.5, -(2.0**-66)], (16, 32)))
    c = rng.choice([2.0**-127, -(2.0**-149), 2.0**-126, 0.0, -0.0], (16, 16)).astype(np.float32)
    expected = tdpbf16ps(c, tiny, other)
    assert_same_bits(run_multiply(unit, c, tiny, other), expected)
    # A denormal among the addends, and a sum that would be one, are zero.
    nothing = np.zeros((16, 32), dtype=np.float32)
    assert not run_multiply(unit, np.full((16, 16), 2.0**-127, np.float32), nothing, nothing).any()
    one = np.zeros((16, 32), dtype=np.float32)
    one[:, 0] = 1.5 * 2.0**-126
    minus = np.zeros((16, 32), dtype=np.float32)
    minus[0, 0::2] = -1.0
    c = np.full((16, 16), 2.0**-126, np.float32)
    assert not run_multiply(unit, c, one, minus).any()


def test_multiply_of_infinities_and_nan(unit: ctypes.CDLL) -> None:
    a = np.ones((16, 32), dtype=np.float32)
    b = np.ones((16, 32), dtype=np.float32)
    a[1, 4], a[2, 7], a[3, 0], a[3, 2] = np.inf, np.nan, np.inf, -np.inf
    b[5, 2 * 9] = 0.0
    a[4, 10] = np.inf  # times b[5, even half of column 9] = 0
    c = np.zeros((16, 16), dtype=np.float32)
    result = run_multiply(unit, c, a, b)
    assert_same_bits(result, tdpbf16ps(c, a, b))
    assert (result[1] == np.inf).all() and np.isnan(result[2]).all() and np.isnan(result[3]).all()
    assert np.isnan(result[4, 9]) and (np.delete(result[4], 9) == np.inf).all()
    assert np.isfinite(result[0]).all() and np.isfinite(result[5:]).all()
