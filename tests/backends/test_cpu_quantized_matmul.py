"""quantized_matmul and its grad_x on the CPU: every level's paths against fp64, and what must hold
bit for bit."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qlora_kernels.backends.cpu import panels
from qlora_kernels.backends.cpu.common import ISA_NAMES, weight_arguments
from qlora_kernels.backends.cpu.matmul_path import choose_path
from qlora_kernels.backends.cpu.quantized_matmul import (
    quantized_matmul_backward_input_cpu,
    quantized_matmul_cpu,
)
from qlora_kernels.formats import Codebook, list_formats
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.shapes import BLOCK_SIZES, RAGGED_WEIGHTS, TOKENS
from tests.problems import DTYPES, SCALES, random_weight
from tests.tolerances import assert_matmul, assert_matmul_backward, exact_weight

pytestmark = pytest.mark.usefixtures("poisoned")


def leave_nan_in_scratch(isa: int, dtype: torch.dtype) -> None:
    """Fill the kernels' reused buffers with NaN: what a later call reads must be its own."""
    weight = random_weight((160, 640))._replace(absmax=torch.full((1600,), math.nan))
    for tokens in (1, 20, 70):
        quantized_matmul_cpu(isa, torch.full((tokens, 640), math.nan, dtype=dtype), weight)
        grad_y = torch.full((tokens, 160), math.nan, dtype=dtype)
        quantized_matmul_backward_input_cpu(isa, grad_y, weight)


def check(
    isa: int,
    weight: WeightOperands,
    tokens: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
) -> None:
    """Forward and backward of random operands to within the matmul rule."""
    rows, cols = weight.shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    grad_y = torch.randn(tokens, rows, generator=generator).to(dtype)
    bias = None if bias_dtype is None else torch.randn(rows, generator=generator).to(bias_dtype)
    assert_matmul(quantized_matmul_cpu(isa, x, weight, bias), x, weight, bias)
    assert_matmul_backward(quantized_matmul_backward_input_cpu(isa, grad_y, weight), grad_y, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RAGGED_WEIGHTS, ids=str)
def test_matmul_of_ragged_weights(isa: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    biases = (None, *DTYPES)
    leave_nan_in_scratch(isa, dtype)
    for i, tokens in enumerate(TOKENS):
        block_size, scales = BLOCK_SIZES[i % 3], SCALES[i % 2]
        weight = random_weight(shape, block_size, scales, ("fp4", "int4", "nf4")[i % 3], seed=i)
        check(isa, weight, tokens, dtype, biases[i % 4])


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, DTYPES[i % 3]) for i, name in enumerate(list_formats())], ids=str
)
def test_matmul_of_every_format(isa: int, name: str, scales: str, dtype: torch.dtype) -> None:
    for i, block_size in enumerate(BLOCK_SIZES):
        # 416 is a multiple of 32 but of no larger block, 415 of nothing; 1024 is of many.
        shape = ((40, 416), (23, 415), (12, 1024))[i % 3]
        weight = random_weight(shape, block_size, scales, name, seed=i)
        for tokens in (1, 4, 70):
            check(isa, weight, tokens, dtype)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 4096])
@pytest.mark.parametrize("shape", [(48, 256), (130, 384), (65, 1344), (200, 64)], ids=str)
def test_matmul_of_aligned_weights(isa: int, shape: tuple[int, int], block_size: int) -> None:
    # Around the tiles of 16 and 32 tokens, of 32 and 64 features, and chunks of 128 and 256 of K.
    for i, tokens in enumerate((1, 15, 16, 17, 31, 32, 33, 48, 65)):
        weight = random_weight(shape, block_size, SCALES[i % 2], seed=i)
        for dtype in DTYPES if tokens in (1, 17, 48) else (torch.bfloat16,):
            check(isa, weight, tokens, dtype, dtype)


# [N, K] with an axis longer than the 2048 whose packed operand 256 tokens keep in cache, and the
# block size: 4096 begins a cache's share in the middle of a block.
LONG_WEIGHTS = (
    ((96, 2336), 64),
    ((48, 2304), 64),
    ((40, 4096), 4096),
    ((65, 2111), 64),
    ((2600, 96), 64),
    ((2112, 128), 128),
    ((2111, 65), 32),
)


@pytest.mark.parametrize("tokens", [257, 300])
@pytest.mark.parametrize(("shape", "block_size"), LONG_WEIGHTS, ids=str)
def test_matmul_in_several_passes(
    isa: int, shape: tuple[int, int], block_size: int, tokens: int
) -> None:
    weight = random_weight(shape, block_size, "nested")
    check(isa, weight, tokens, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("shape", [(70, 33056), (66, 33024), (33056, 70), (33024, 64)], ids=str)
def test_few_tokens_in_several_passes(isa: int, shape: tuple[int, int]) -> None:
    # Longer than the 32768 that 16 tokens keep in cache, and the 16384 of 32.
    weight = random_weight(shape, 64)
    for tokens in (3, 20):
        check(isa, weight, tokens, torch.bfloat16)


@pytest.mark.parametrize("shape", [(4130, 2080), (2080, 4130)], ids=str)
def test_matmul_of_a_large_weight(isa: int, shape: tuple[int, int]) -> None:
    # Both axes longer than what waits at a time (4096 features by 2048 of K, and the reverse), and
    # several panels in fp32.
    weight = random_weight(shape, 64, "nested")
    x, grad_y = torch.randn(256, shape[1]), torch.randn(256, shape[0])
    for dtype in (torch.float32, torch.bfloat16):
        y = quantized_matmul_cpu(isa, x.to(dtype), weight)
        grad_x = quantized_matmul_backward_input_cpu(isa, grad_y.to(dtype), weight)
        assert y.shape == (256, shape[0]) and grad_x.shape == (256, shape[1])
        # Some tokens suffice: all went the same way.
        few = torch.arange(0, 256, 37)
        assert_matmul(y[few], x.to(dtype)[few], weight)
        assert_matmul_backward(grad_x[few], grad_y.to(dtype)[few], weight)
        assert y.isfinite().all() and grad_x.isfinite().all()


def test_grad_x_of_very_many_rows(isa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A panel of all rows would have few columns: blocks of 32 rows by 128, and what is left.
    monkeypatch.setattr(panels, "PANEL_BYTES", 1 << 14)
    monkeypatch.setattr(panels, "LEAST_COLUMNS", 128)
    for shape in ((300, 130), (97, 257), (5000, 64)):
        weight = random_weight(shape, 64)
        grad_y = torch.randn(64, shape[0])
        assert_matmul_backward(panels.backward_by_panels(isa, grad_y, weight), grad_y, weight)


@pytest.mark.parametrize("tokens", [1, 4, 24])
def test_long_sums_stay_as_accurate_as_torchs(isa: int, tokens: int) -> None:
    # One chain of fp32 additions over 16384 terms would be off by four times as much as torch.
    check(isa, random_weight((16384, 64), 64), tokens, torch.float32)
    check(isa, random_weight((64, 16384), 64), tokens, torch.float32)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0), (5, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_of_nothing(isa: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, cols = shape
    for scales in SCALES:
        weight = random_weight(shape, 64, scales)
        for tokens in (0, 1, 70):
            x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
            for invariant in (False, True):
                y = quantized_matmul_cpu(isa, x, weight, bias, invariant)
                assert y.shape == (tokens, rows) and y.dtype == dtype and not y.isnan().any()
                assert cols or torch.equal(y, bias.expand(tokens, rows))
            grad_y = torch.randn(tokens, rows).to(dtype)
            grad_x = quantized_matmul_backward_input_cpu(isa, grad_y, weight)
            assert grad_x.shape == (tokens, cols) and grad_x.dtype == dtype
            assert not grad_x.isnan().any() and (rows or not grad_x.any())


@pytest.mark.parametrize("count", range(2, 17))
def test_matmul_takes_any_table(isa: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator).tolist()
    for i, shape in enumerate(((24, 160), (9, 77))):
        weight = random_weight(shape, 32, SCALES[i], Codebook("any", values), seed=count)
        for tokens in (1, 5, 70):
            check(isa, weight, tokens, DTYPES[(count + tokens) % 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_zero_and_of_either_sign(isa: int, dtype: torch.dtype) -> None:
    weight = random_weight((32, 256), 64)
    absmax = torch.tensor([0.0, -0.0, 1.5, -1.5]).repeat(32)
    weight = weight._replace(absmax=absmax)
    assert not exact_weight(weight)[:, :128].any()
    for tokens in (1, 7, 70):
        check(isa, weight, tokens, dtype)
        # What meets only zero weights adds nothing, however large.
        x = torch.randn(tokens, 256).to(dtype)
        large = x.clone()
        large[:, :128] = 3e4
        y = quantized_matmul_cpu(isa, x, weight)
        assert_bitwise_equal(quantized_matmul_cpu(isa, large, weight), y)


@pytest.mark.parametrize("shape", [(20, 96), (21, 77), (40, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_that_is_nan_stays_in_its_block(
    isa: int, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    rows, cols = shape
    weight = random_weight(shape, 32)
    assert weight.absmax is not None
    absmax = weight.absmax.clone()
    absmax[[1, len(absmax) // 2, len(absmax) - 1]] = math.nan
    weight = weight._replace(absmax=absmax)
    bad = exact_weight(weight).isnan()
    for tokens in (1, 3, 70):
        y = quantized_matmul_cpu(isa, torch.randn(tokens, cols).to(dtype), weight)
        assert torch.equal(y.isnan(), bad.any(dim=1).expand(tokens, rows))
        grad_y = torch.randn(tokens, rows).to(dtype)
        grad_x = quantized_matmul_backward_input_cpu(isa, grad_y, weight)
        assert torch.equal(grad_x.isnan(), bad.any(dim=0).expand(tokens, cols))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_stays_alone(isa: int, dtype: torch.dtype, bad: float) -> None:
    for shape in ((17, 100), (64, 256)):
        weight = random_weight(shape, 64)
        rows, cols = shape
        for tokens in (2, 5, 70):
            x, grad_y = torch.randn(tokens, cols), torch.randn(tokens, rows)
            x[1, cols // 2], grad_y[1, rows // 2] = bad, bad
            x, grad_y = x.to(dtype), grad_y.to(dtype)
            y = quantized_matmul_cpu(isa, x, weight)
            grad_x = quantized_matmul_backward_input_cpu(isa, grad_y, weight)
            for result in (y, grad_x):
                finite = result.isfinite()
                assert not finite[1].any() and finite[torch.arange(tokens) != 1].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_is_not_finite_changes_no_bit_of_another(isa: int, dtype: torch.dtype) -> None:
    # bf16 multiplies as integers where it can: a row that cannot goes alone.
    for shape in ((17, 100), (40, 256)):
        weight = random_weight(shape, 64, "nested")
        x = torch.randn(6, shape[1]).to(dtype)
        expected = quantized_matmul_cpu(isa, x, weight, None, True)
        for bad in ([0], [5], [1, 2, 4]):
            changed = x.clone()
            changed[bad, 3] = math.inf
            y = quantized_matmul_cpu(isa, changed, weight, None, True)
            finite = [t for t in range(6) if t not in bad]
            assert_bitwise_equal(y[finite], expected[finite])
            assert not y[bad].isfinite().any()


@pytest.mark.parametrize("size", [2.0**-100, 1.0, 2.0**100])
@pytest.mark.parametrize("outlier", [2.0**6, 2.0**20])
def test_numbers_of_very_different_sizes(isa: int, size: float, outlier: float) -> None:
    # Eight neighbours of bf16 share an exponent where they multiply as integers.
    weight = random_weight((72, 520), 64, "nested")
    for tokens in (1, 4, 9):
        x = torch.randn(tokens, 520) * size
        x[:, ::9] *= outlier
        x[:, ::7] /= outlier
        x[:, 40:80] = 0.0
        x = x.to(torch.bfloat16)
        assert_matmul(quantized_matmul_cpu(isa, x, weight), x, weight)


def test_an_element_is_as_near_as_its_neighbours_allow(isa: int) -> None:
    # What README promises by elements: x times an identity, small numbers beside large ones.
    codes = 7 + 8 * torch.eye(64, dtype=torch.uint8)  # nf4's 0 and 1
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).flatten()
    weight = random_weight((64, 64))._replace(codes=packed, absmax=torch.ones(64))
    x = (torch.randn(3, 64) * torch.tensor([1.0, 2.0**-9]).repeat(32)).to(torch.bfloat16)
    largest = x.abs().view(3, 8, 8).amax(-1, keepdim=True).expand(3, 8, 8).reshape(3, 64)
    error = (quantized_matmul_cpu(isa, x, weight).double() - x.double()).abs()
    assert (error <= largest.double() * 2.0**-15 + x.double().abs() * 2.0**-8).all()


def test_the_largest_sums(isa: int) -> None:
    # All of one sign and of the most bits: 8 products fill 31 bits where they are integers.
    weight = random_weight((16, 256), 64)
    weight = weight._replace(codes=torch.full_like(weight.codes, 0xFF))
    for sign in (1.0, -1.0):
        x = torch.full((3, 256), sign * (2.0 - 2.0**-7)).to(torch.bfloat16)
        assert_matmul(quantized_matmul_cpu(isa, x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_takes_any_strides(isa: int, dtype: torch.dtype) -> None:
    weight = random_weight((33, 96), 32, "nested")
    for tokens in (1, 6, 70):
        x = torch.randn(tokens, 96).to(dtype)
        grad_y = torch.randn(tokens, 33).to(dtype)
        bias = torch.randn(33).to(dtype)
        y = quantized_matmul_cpu(isa, x, weight, bias)
        grad_x = quantized_matmul_backward_input_cpu(isa, grad_y, weight)
        wide = torch.full((tokens, 200), 7.0, dtype=dtype)
        wide[:, 1:193:2] = x
        for strided in (x.t().contiguous().t(), wide[:, 1:193:2]):
            apart = bias.repeat_interleave(3)[::3]
            assert_bitwise_equal(quantized_matmul_cpu(isa, strided, weight, apart), y)
        turned = grad_y.t().contiguous().t()
        assert_bitwise_equal(quantized_matmul_backward_input_cpu(isa, turned, weight), grad_x)
        repeated = quantized_matmul_cpu(isa, x[:1].expand(tokens, 96), weight, bias)
        assert_bitwise_equal(
            repeated, quantized_matmul_cpu(isa, x[:1].repeat(tokens, 1), weight, bias)
        )
        spread = weight._replace(codes=weight.codes.repeat_interleave(2)[::2])
        assert_bitwise_equal(quantized_matmul_cpu(isa, x, spread, bias), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_that_cancels_is_added_before_the_rounding(isa: int, dtype: torch.dtype) -> None:
    # Weights that every dtype holds exactly: the error left is that of rounding y, and of rounding
    # it twice if the bias came after.
    weight = random_weight(
        (96, 256), 64, codebook=Codebook("halves", [i / 8 for i in range(-8, 8)])
    )
    weight = weight._replace(absmax=torch.full((384,), 2.0))
    for tokens in (1, 4, 70):
        common = torch.randn(256).to(dtype)
        x = (common + 0.05 * torch.randn(tokens, 256)).to(dtype)
        bias = -(common.double() @ exact_weight(weight).T).to(dtype)
        y = quantized_matmul_cpu(isa, x, weight, bias)
        assert y.abs().max() < bias.abs().max() / 3
        assert_matmul(y, x, weight, bias)


@pytest.mark.parametrize("shape", [(65, 257), (64, 96), (40, 256), (130, 1030)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_rows(isa: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random_weight(shape, 64, "nested")
    x = torch.randn(70, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    y = quantized_matmul_cpu(isa, x, weight, bias, batch_invariant=True)
    assert_matmul(y, x, weight, bias)
    for begin, end in ((0, 1), (1, 2), (69, 70), (3, 6), (5, 22), (0, 33), (30, 70)):
        part = quantized_matmul_cpu(isa, x[begin:end], weight, bias, batch_invariant=True)
        assert_bitwise_equal(part, y[begin:end])
    others = torch.randn_like(x) * 100
    others[11], others[40] = x[11], x[40]
    among = quantized_matmul_cpu(isa, others, weight, bias, batch_invariant=True)
    assert_bitwise_equal(among[[11, 40]], y[[11, 40]])


@pytest.mark.parametrize("shape", [(65, 257), (256, 512), (2600, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_paths_do_not_depend_on_the_threads(
    isa: int, dtype: torch.dtype, shape: tuple[int, int], one_thread_then_two: tuple[int, int]
) -> None:
    # Panels go through torch's GEMM, which promises nothing of the kind.
    weight = random_weight(shape, 64, "nested")
    for tokens in (1, 4, 20, 260):
        if choose_path(tokens, *shape, dtype, isa) == "panels":
            continue
        x, grad_y = torch.randn(tokens, shape[1]).to(dtype), torch.randn(tokens, shape[0]).to(dtype)
        results = []
        for threads in one_thread_then_two:
            torch.set_num_threads(threads)
            y = quantized_matmul_cpu(isa, x, weight)
            results.append((y, quantized_matmul_backward_input_cpu(isa, grad_y, weight)))
        for one, two in zip(*results, strict=True):
            assert_bitwise_equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_from_several_threads_do_not_mix(isa: int, dtype: torch.dtype) -> None:
    weights = [random_weight((200, 320), 64, "nested", seed=i) for i in range(4)]
    tokens = (1, 6, 33, 70)

    def product(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight, count = weights[i % 4], tokens[i // 4 % 4]
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(count, 320, generator=generator).to(dtype)
        grad_y = torch.randn(count, 200, generator=generator).to(dtype)
        y = quantized_matmul_cpu(isa, x, weight)
        return y, quantized_matmul_backward_input_cpu(isa, grad_y, weight)

    alone = [product(i) for i in range(32)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(product, range(32)))
    for pair, expected in zip(together, alone, strict=True):
        for got, wanted in zip(pair, expected, strict=True):
            assert_bitwise_equal(got, wanted)


def test_bindings_reject_what_would_corrupt_memory(isa: int) -> None:
    weight = random_weight((8, 64))
    x, grad_y = torch.randn(2, 64), torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="codes must have 256 elements, got 255"):
        quantized_matmul_cpu(isa, x, weight._replace(codes=weight.codes[1:]))
    with pytest.raises(RuntimeError, match=r"x must be a contiguous CPU tensor \[tokens, 64\]"):
        quantized_matmul_cpu(isa, torch.randn(2, 63), weight)
    with pytest.raises(RuntimeError, match="bias must have 8 elements, got 7"):
        quantized_matmul_cpu(isa, x, weight, torch.randn(7))
    with pytest.raises(RuntimeError, match=r"grad_y must be a contiguous CPU tensor \[tokens, 8\]"):
        quantized_matmul_backward_input_cpu(isa, grad_y[:, 1:], weight)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        quantized_matmul_cpu(isa, x.double(), weight)
    with pytest.raises(RuntimeError, match="isa must be at most"):
        arguments = weight_arguments(weight)
        product = torch.ops.qlora_kernels_cpu.quantized_matmul.default
        product(x, *arguments, None, torch.empty(2, 8), False, len(ISA_NAMES))
