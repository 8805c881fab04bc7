"""The matmuls against fp64: every path and tile shape, ragged sizes, dropout replayed, and what
must hold bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from qlora_kernels.backends.device import H200
from qlora_kernels.backends.launch_config import (
    FEW_TOKENS,
    Decode,
    MatmulConfig,
    MatmulSizes,
    backward_config,
    choose_path,
    few_tokens_config,
    forward_config,
)
from qlora_kernels.backends.triton.dequantize import dequantize_triton
from qlora_kernels.backends.triton.low_rank import run_all
from qlora_kernels.backends.triton.quantized_matmul import (
    Down,
    Up,
    backward_launch,
    few_tokens_launches,
    forward_launches,
    one_token_launch,
    quantized_matmul_backward_input_triton,
    quantized_matmul_triton,
)
from qlora_kernels.reference import dropout_reference
from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal
from qlora_kernels.testing.shapes import RAGGED_WEIGHTS
from tests.problems import DTYPES, SCALES, random_qlora, random_weight
from tests.triton.checks import (
    MANY_TOKENS,
    backward,
    check_matmul,
    check_qlora,
    check_repeats,
    forward,
    many_tokens_are_few,
    qlora_on,
    random_problem,
)

NARROW = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RAGGED_WEIGHTS, ids=str)
def test_qlora_of_ragged_weights(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for i, tokens in enumerate((0, 1, 2, 5, 17, 33)):
        p = random_qlora(
            tokens,
            random_weight(shape, (32, 64, 128)[i % 3], SCALES[i % 2], seed=i),
            (1, 3, 8, 17)[i % 4],
            dtype,
            DTYPES[(i // 2) % 3],
            bias_dtype=(None, *DTYPES)[i % 4],
            dropout_p=(0.0, 0.1, 1.0)[i % 3],
            seed=i,
        )
        check_qlora(device, p)


# tokens, N, K, rank, block size: every token tile of both kernels, K above and below a tile, scales
# finer and coarser than one, several tiles of everything.
FUSED = (
    (1, 40, 1088, 4, 64),
    (1, 17, 64, 70, 32),
    (3, 130, 192, 16, 64),
    (16, 65, 1216, 5, 32),
    (20, 150, 320, 70, 128),
    (40, 129, 96, 70, 32),
    (70, 140, 256, 8, 4096),
    (300, 130, 128, 16, 64),
    (1, 33, 1040, 4, 16),
    (20, 40, 80, 4, 16),
)


@pytest.mark.parametrize("sizes", FUSED, ids=str)
def test_qlora_fused(device: torch.device, sizes: tuple[int, int, int, int, int]) -> None:
    tokens, rows, cols, rank, block_size = sizes
    dtype = NARROW[FUSED.index(sizes) % 2]
    wanted = "few_tokens" if tokens <= FEW_TOKENS and block_size >= 32 else "fused"
    if tokens == 1 and block_size < 32:
        wanted = "one_token"
    assert choose_path(MatmulSizes(tokens, rows, cols, dtype, block_size)) == wanted
    weight = random_weight(
        (rows, cols), block_size, SCALES[tokens % 2], ("nf4", "fp4", "int4")[rows % 3]
    )
    p = random_qlora(
        tokens, weight, rank, dtype, torch.float32, bias_dtype=torch.float32, dropout_p=0.1
    )
    check_qlora(device, p)
    check_matmul(device, p)


def test_every_tile_of_tokens_is_tested() -> None:
    few, fused = set(), set()
    for tokens, rows, cols, _, block_size in FUSED:
        sizes = MatmulSizes(tokens, rows, cols, torch.bfloat16, block_size)
        path = choose_path(sizes)
        if path == "few_tokens":
            config = few_tokens_config(sizes, H200)
            few.add((config.tile_m, config.tile_n))
        elif path == "fused":
            fused.add(forward_config(sizes, H200).tile_m)
    assert few == {(8, 64), (16, 32), (32, 32)} and fused == {32, 64, 128}


@pytest.mark.parametrize("scales", SCALES)
def test_few_tokens_in_splits(device: torch.device, scales: str) -> None:
    p = qlora_on(device, 3, random_weight((40, 1088), 64, scales), 6, torch.bfloat16)
    dense = dequantize_triton(p.weight, p.weight.shape, torch.float32).double()
    xa = (p.x.double() @ p.lora_a.double().T).to(p.x.dtype)
    exact = p.x.double() @ dense.T + p.scaling * xa.double() @ p.lora_b.double().T
    torchs = F.linear(p.x, dense.to(p.x.dtype)) + p.scaling * F.linear(xa, p.lora_b)
    for splits in (2, 5):
        config = MatmulConfig(8, 64, 256, splits, 4, 3, "prmt")
        y = torch.empty(3, 40, dtype=p.x.dtype, device=device)
        up = Up(p.lora_b, xa, p.scaling)
        run_all(few_tokens_launches(p.x, p.weight, None, up, y, config))
        assert_as_accurate(y, exact, torchs)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_tables_that_fp16_does_not_hold(device: torch.device, dtype: torch.dtype) -> None:
    for scale in (2.0**-30, 2.0**40):
        weight = random_weight((40, 128), 64)
        assert weight.absmax is not None
        table, absmax = weight.codebook * scale, weight.absmax / scale
        scaled = weight._replace(codebook=table, absmax=absmax)
        check_matmul(device, random_qlora(4, scaled, 0, dtype))


@pytest.mark.parametrize(
    ("shape", "dropout_p", "dtype"),
    [
        ((64, 96), 0.0, torch.bfloat16),
        ((33, 100), 0.0, torch.float16),
        ((200, 96), 0.0, torch.bfloat16),
        ((64, 64), 0.2, torch.bfloat16),
    ],
    ids=str,
)
@many_tokens_are_few()
def test_qlora_dense(
    device: torch.device, shape: tuple[int, int], dropout_p: float, dtype: torch.dtype
) -> None:
    # Forward and backward as one GEMM over K + R or N + R, or as the sum of two products.
    weight = random_weight(shape, 32, "nested")
    p = random_qlora(
        MANY_TOKENS,
        weight,
        5,
        dtype,
        torch.float32,
        bias_dtype=torch.float32,
        dropout_p=dropout_p,
    )
    check_qlora(device, p)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_share_the_sum(device: torch.device, dtype: torch.dtype, scales: str) -> None:
    # The fused kernels also in fp32, which the choice of paths leaves to torch's GEMM.
    decodes: dict[int, Decode] = {64: "gather", 128: "gather"}
    if dtype == torch.bfloat16:
        decodes[128] = "prmt"
    weight = random_weight((70, 640), 64, scales)
    p = qlora_on(device, 20, weight, 6, dtype, bias_dtype=dtype)
    dense = dequantize_triton(p.weight, weight.shape, torch.float32).to(dtype).double()
    xa = (p.x.double() @ p.lora_a.double().T).to(dtype)
    assert p.bias is not None
    exact = p.x.double() @ dense.T + p.bias.double()
    exact += p.scaling * xa.double() @ p.lora_b.double().T
    torchs = F.linear(p.x, dense.to(dtype), p.bias) + p.scaling * F.linear(xa, p.lora_b)
    for splits, tile_k in ((1, 64), (3, 128), (10, 64)):
        config = MatmulConfig(32, 64, tile_k, splits, 4, 2, decodes[tile_k])
        y = torch.empty(20, 70, dtype=dtype, device=device)
        run_all(forward_launches(p.x, p.weight, p.bias, Up(p.lora_b, xa, p.scaling), y, config))
        assert_as_accurate(y, exact, torchs)
    u = torch.randn(20, 6).to(device, dtype)
    exact_x = p.grad_y.double() @ dense + u.double() @ p.lora_a.double()
    torchs_base = p.grad_y @ dense.to(dtype)
    torchs_x = torchs_base + u @ p.lora_a
    for tile_k in (64, 128):
        grad_x = torch.empty(20, 640, dtype=dtype, device=device)
        config = MatmulConfig(32, 64, tile_k, 1, 4, 2, decodes[tile_k])
        backward_launch(p.grad_y, p.weight, Down(p.lora_a, u, 0.0, None), grad_x, config).run()
        assert_as_accurate(grad_x, exact_x, torchs_x)
        before = grad_x.clone()
        backward_launch(p.grad_y, p.weight, None, grad_x, config, accumulate=True).run()
        exact_sum = before.double() + p.grad_y.double() @ dense
        assert_as_accurate(grad_x, exact_sum, before + torchs_base)


def test_codes_may_begin_anywhere(device: torch.device) -> None:
    config = MatmulConfig(16, 64, 64, 1, 4, 2)
    for tokens in (1, 9):
        p = qlora_on(device, tokens, random_weight((33, 128), 32), 4, torch.float16)
        y, xa = forward(p)
        expected = (y, xa, *backward(p, xa))
        for offset in (1, 2, 4):
            padded = torch.cat([p.weight.codes.new_zeros(offset), p.weight.codes])
            shifted = dataclasses.replace(p, weight=p.weight._replace(codes=padded[offset:]))
            weight = shifted.weight
            for launch in (
                one_token_launch(p.x, weight, None, None, y),
                *forward_launches(p.x, weight, None, None, y, config),
                backward_launch(p.grad_y, weight, None, p.x, config),
            ):
                assert launch.arguments["codes_ptr"].data_ptr() % 4 == 0
            got = (*forward(shifted), *backward(shifted, xa))
            for mine, wanted in zip(got, expected, strict=True):
                assert_bitwise_equal(mine, wanted)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_long_sums_are_not_rounded_on_their_way(device: torch.device, dtype: torch.dtype) -> None:
    config = MatmulConfig(16, 64, 64, 1, 4, 2)
    for shape in ((17, 4096), (4096, 64)):
        weight = random_weight(shape, 64)
        p = qlora_on(device, 8, weight, 0, dtype)
        dense = dequantize_triton(p.weight, shape, torch.float32).to(dtype).double()
        if shape[1] == 4096:
            y = torch.empty(8, 17, dtype=dtype, device=device)
            run_all(forward_launches(p.x, p.weight, None, None, y, config))
            assert_as_accurate(y, p.x.double() @ dense.T, F.linear(p.x, dense.to(dtype)))
        else:
            grad_x = torch.empty(8, 64, dtype=dtype, device=device)
            backward_launch(p.grad_y, p.weight, None, grad_x, config).run()
            assert_as_accurate(grad_x, p.grad_y.double() @ dense, p.grad_y @ dense.to(dtype))


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_two_runs_agree_in_every_bit(device: torch.device, tokens: int) -> None:
    weight = random_weight((130, 192), 64, "nested")
    check_repeats(device, random_qlora(tokens, weight, 16, torch.bfloat16, dropout_p=0.1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_zero_is_the_base_alone(device: torch.device, dtype: torch.dtype) -> None:
    weight = random_weight((33, 96), 32)
    for tokens in (1, 5, 40):
        p = qlora_on(device, tokens, weight, 0, dtype, bias_dtype=dtype)
        y, xa = forward(p)
        assert xa.shape == (tokens, 0)
        assert_bitwise_equal(y, quantized_matmul_triton(p.x, p.weight, p.bias))
        grad_x, grad_a, grad_b = backward(p, xa)
        assert_bitwise_equal(grad_x, quantized_matmul_backward_input_triton(p.grad_y, p.weight))
        assert grad_a.shape == (0, 96) and grad_b.shape == (33, 0)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(
    ("tokens", "shape"), [(0, (5, 64)), (3, (0, 64)), (3, (5, 0)), (3, (0, 0))], ids=str
)
def test_qlora_of_nothing(
    device: torch.device, tokens: int, shape: tuple[int, int], invariant: bool
) -> None:
    p = random_qlora(tokens, random_weight(shape), 3, torch.float32, bias_dtype=torch.float32)
    check_qlora(device, p, invariant)


@many_tokens_are_few()
def test_needs_leaves_out_what_is_not_asked_for(device: torch.device) -> None:
    weight = random_weight((33, 128), 32)
    for tokens in (1, 40, MANY_TOKENS):
        p = qlora_on(device, tokens, weight, 5, torch.bfloat16, torch.float32)
        xa = forward(p)[1]
        everything = backward(p, xa)
        for needs in itertools.product([False, True], repeat=3):
            for needed, got, wanted in zip(needs, backward(p, xa, needs), everything, strict=True):
                assert_bitwise_equal(got, wanted if needed else wanted.new_empty(0))


@pytest.mark.parametrize("cols", [131, 192])
def test_dropout_is_that_of_the_reference(device: torch.device, cols: int) -> None:
    # With odd K rows begin at every place in the groups of four words.
    weight = random_weight((48, cols), 32)
    for tokens in (1, 7, 41):
        p = qlora_on(device, tokens, weight, 6, torch.bfloat16, dropout_p=0.3, seed=tokens)
        plain = dataclasses.replace(p, dropout_p=0.0, seed=None)
        masked = plain.with_x(dropout_reference(p.x, 0.3, p.seed))
        _, xa = forward(p)
        assert_bitwise_equal(xa, forward(masked)[1])
        grad_x, grad_a, grad_b = backward(p, xa)
        _, masked_a, masked_b = backward(masked, xa)
        assert_bitwise_equal(grad_a, masked_a)
        assert_bitwise_equal(grad_b, masked_b)
        # The base sees the whole x, and grad_x is its own where an element was dropped.
        dropped = dropout_reference(torch.ones_like(p.x), 0.3, p.seed) == 0
        base = quantized_matmul_backward_input_triton(p.grad_y, p.weight)
        assert_bitwise_equal(grad_x[dropped], base[dropped])
        assert (grad_x != base)[~dropped].float().mean() > 0.8


def test_a_dropped_nan_does_not_reach_the_adapter(device: torch.device) -> None:
    weight = random_weight((33, 96), 32)
    for tokens in (2, 40):
        p = qlora_on(device, tokens, weight, 4, torch.float16, dropout_p=0.5)
        dropped = dropout_reference(torch.ones_like(p.x), 0.5, p.seed) == 0
        x = torch.where(dropped, torch.full_like(p.x, math.nan), p.x)
        y, xa = forward(p.with_x(x))
        assert y.isnan().all()
        assert_bitwise_equal(xa, forward(p)[1])
        _, grad_a, grad_b = backward(p.with_x(x), xa)
        assert grad_a.isfinite().all() and grad_b.isfinite().all()
        bad = dataclasses.replace(p, lora_a=torch.full_like(p.lora_a, math.nan))
        grad_x = backward(bad, xa, (True, False, False))[0]
        assert torch.equal(grad_x.isnan(), ~dropped)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(device: torch.device, bad: float) -> None:
    for (shape, rank), tokens in itertools.product((((17, 100), 3), ((64, 256), 40)), (2, 40)):
        p = qlora_on(device, tokens, random_weight(shape), rank, torch.float16)
        p.x[1, 50], p.grad_y[1, 9] = bad, bad
        y, xa = forward(p)
        others = torch.arange(tokens, device=device) != 1
        for result in (y, xa, backward(p, xa)[0]):
            assert not result[1].isfinite().any() and result[others].isfinite().all()


def test_qlora_takes_any_strides(device: torch.device) -> None:
    weight = random_weight((33, 96), 32, "nested")
    for tokens in (1, 40):
        p = qlora_on(device, tokens, weight, 6, torch.float16, bias_dtype=torch.float16)
        y, xa = forward(p)
        gradients = backward(p, xa)
        names = ("x", "grad_y", "lora_a", "lora_b")
        turned = {name: getattr(p, name).t().contiguous().t() for name in names}
        assert p.bias is not None
        q = dataclasses.replace(p, **turned, bias=p.bias.repeat_interleave(2)[::2])
        turned_y, turned_xa = forward(q)
        assert_bitwise_equal(turned_y, y)
        assert_bitwise_equal(turned_xa, xa)
        for got, wanted in zip(backward(q, xa.t().contiguous().t()), gradients, strict=True):
            assert_bitwise_equal(got, wanted)


def test_batch_invariant_products_are_right(device: torch.device) -> None:
    for dtype, tokens in itertools.product(DTYPES, (1, 70)):
        p = random_qlora(tokens, random_weight((40, 256), 64), 7, dtype, bias_dtype=dtype)
        check_qlora(device, p, invariant=True)
        sizes = MatmulSizes(tokens, 40, 256, dtype, 64, True)
        one = forward_config(sizes._replace(tokens=1), H200)
        assert forward_config(sizes, H200) == one, "the configuration may not depend on M"


def test_the_backward_configuration_covers_every_k(device: torch.device) -> None:
    for cols in (32, 64, 96, 4096, 11008):
        config = backward_config(MatmulSizes(512, 64, cols, torch.bfloat16, 32), H200)
        assert config.tile_k % 64 == 0


def test_random_problems(device: torch.device) -> None:
    for seed in range(12):
        check_qlora(device, random_problem(seed, most_tokens=130))
