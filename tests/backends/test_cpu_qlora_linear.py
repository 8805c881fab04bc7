"""qlora_linear and its backward on the CPU: every level's paths against fp64, dropout replayed, and
what must hold bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from qlora_kernels.backends.cpu.matmul_path import choose_path
from qlora_kernels.backends.cpu.qlora_linear import qlora_linear_backward_cpu, qlora_linear_cpu
from qlora_kernels.backends.cpu.quantized_matmul import (
    quantized_matmul_backward_input_cpu,
    quantized_matmul_cpu,
)
from qlora_kernels.reference import dropout_reference
from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal
from qlora_kernels.testing.shapes import BLOCK_SIZES, RAGGED_WEIGHTS, TOKENS
from tests.problems import DTYPES, SCALES, QLoRAProblem, random_qlora, random_weight
from tests.tolerances import assert_qlora, assert_qlora_backward

pytestmark = pytest.mark.usefixtures("poisoned")

# Around the vectors of 4, the tiles of 32 and the runs of 64 that ranks are worked on in.
RANKS = (1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 70)
DROPOUTS = (0.0, 0.1, 0.5, 1.0)
ALL = (True, True, True)


def forward(isa: int, p: QLoRAProblem, invariant: bool = False) -> tuple[torch.Tensor, ...]:
    return qlora_linear_cpu(
        isa, p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, p.dropout_p, p.seed, invariant
    )


def backward(
    isa: int, p: QLoRAProblem, xa: torch.Tensor, needs: tuple[bool, bool, bool] = ALL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return qlora_linear_backward_cpu(
        isa,
        p.grad_y,
        p.x,
        xa,
        p.weight,
        p.lora_a,
        p.lora_b,
        p.scaling,
        p.dropout_p,
        p.seed,
        needs,
    )


def check(isa: int, p: QLoRAProblem) -> None:
    """Forward and backward to within the matmul rule."""
    y, xa = forward(isa, p)
    assert_qlora(y, xa, p)
    assert_qlora_backward(backward(isa, p, xa), p)


def leave_nan_in_scratch(isa: int, dtype: torch.dtype) -> None:
    """Fill the kernels' reused buffers with NaN: what a later call reads must be its own."""
    weight = random_weight((160, 640))._replace(absmax=torch.full((1600,), math.nan))
    for tokens in (1, 20, 70):
        p = random_qlora(tokens, weight, 72, dtype)
        for tensor in (p.x, p.grad_y, p.lora_a, p.lora_b):
            tensor.fill_(math.nan)
        backward(isa, p, forward(isa, p)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RAGGED_WEIGHTS, ids=str)
def test_qlora_of_ragged_weights(isa: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    leave_nan_in_scratch(isa, dtype)
    for i, tokens in enumerate(TOKENS):
        block_size, scales = BLOCK_SIZES[i % 3], SCALES[i % 2]
        p = random_qlora(
            tokens,
            random_weight(shape, block_size, scales, ("fp4", "int4", "nf4")[i % 3], seed=i),
            RANKS[i],
            dtype,
            DTYPES[(i // 2) % 3],
            bias_dtype=(None, *DTYPES)[i % 4],
            dropout_p=DROPOUTS[(i // 3) % 4],
            seed=i,
        )
        check(isa, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_qlora_of_every_rank(isa: int, rank: int, dtype: torch.dtype) -> None:
    leave_nan_in_scratch(isa, dtype)
    shapes = ((48, 256), (33, 129), (130, 96))
    for i, (shape, tokens) in enumerate(itertools.product(shapes, (1, 3, 18, 70))):
        weight = random_weight(shape, 64, SCALES[i % 2], seed=i)
        p = random_qlora(tokens, weight, rank, dtype, DTYPES[i % 3], dropout_p=DROPOUTS[i % 2])
        check(isa, p)


@pytest.mark.parametrize("shape", [(96, 2336), (2600, 96), (300, 1100)], ids=str)
@pytest.mark.parametrize("tokens", [24, 300])
def test_qlora_of_larger_weights(isa: int, shape: tuple[int, int], tokens: int) -> None:
    # Longer than the strips of 64 and 512 and than the blocks whose sums wait, with every part on.
    weight = random_weight(shape, 64, "nested")
    for dtype in (torch.float32, torch.bfloat16):
        p = random_qlora(
            tokens, weight, 9, dtype, torch.float32, bias_dtype=torch.float32, dropout_p=0.1
        )
        check(isa, p)


def test_gradients_of_many_tokens_stay_as_accurate_as_torchs(isa: int) -> None:
    # One chain of fp32 additions over the tokens would be off by five times as much as torch.
    # Whole numbers make u exact, so that only the sums over the tokens round.
    tokens, weight = 16384, random_weight((16, 64))
    grad_y = torch.randint(-2, 3, (tokens, 16))
    lora_b = torch.randint(-3, 4, (16, 16)).float()
    for dtype in (torch.float32, torch.bfloat16):
        p = random_qlora(tokens, weight, 16, dtype, torch.float32, scaling=1.0)
        p = dataclasses.replace(p, grad_y=grad_y.to(dtype), lora_b=lora_b)
        xa = torch.randn(tokens, 16).to(dtype)
        _, grad_a, grad_b = backward(isa, p, xa, (False, True, True))
        u = grad_y.float() @ lora_b
        for got, left, right in ((grad_a, u, p.x), (grad_b, grad_y, xa)):
            exact = left.double().T @ right.double()
            assert_as_accurate(got, exact, left.float().T @ right.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_zero_is_the_base_alone(isa: int, dtype: torch.dtype) -> None:
    weight = random_weight((33, 96))
    for tokens in (1, 5, 70):
        p = random_qlora(tokens, weight, 0, dtype, bias_dtype=dtype)
        y, xa = forward(isa, p)
        assert xa.shape == (tokens, 0)
        assert_bitwise_equal(y, quantized_matmul_cpu(isa, p.x, weight, p.bias))
        grad_x, grad_a, grad_b = backward(isa, p, xa)
        assert_bitwise_equal(grad_x, quantized_matmul_backward_input_cpu(isa, p.grad_y, weight))
        assert grad_a.shape == (0, 96) and grad_b.shape == (33, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [(0, (5, 64)), (3, (0, 64)), (3, (5, 0)), (30, (0, 64)), (30, (5, 0)), (3, (0, 0))],
    ids=str,
)
def test_qlora_of_nothing(
    isa: int, tokens: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    p = random_qlora(tokens, random_weight(shape), 3, dtype, bias_dtype=dtype, dropout_p=0.1)
    for invariant in (False, True):
        y, xa = forward(isa, p, invariant)
        assert y.shape == (tokens, shape[0]) and xa.shape == (tokens, 3)
        assert_qlora(y, xa, p)
    gradients = backward(isa, p, xa)
    assert_qlora_backward(gradients, p)
    for gradient, like in zip(gradients, (p.x, p.lora_a, p.lora_b), strict=True):
        assert gradient.shape == like.shape and gradient.dtype == like.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_needs_leaves_out_what_is_not_asked_for(isa: int, dtype: torch.dtype) -> None:
    weight = random_weight((33, 129), 32)
    for tokens in (1, 6, 70):
        p = random_qlora(tokens, weight, 5, dtype, torch.float32, dropout_p=0.3)
        _, xa = forward(isa, p)
        everything = backward(isa, p, xa)
        for needs in itertools.product([False, True], repeat=3):
            gradients = backward(isa, p, xa, needs)
            for needed, got, wanted in zip(needs, gradients, everything, strict=True):
                assert_bitwise_equal(got, wanted if needed else wanted.new_empty(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_over_narrow_x_get_fp32_gradients(isa: int, dtype: torch.dtype) -> None:
    weight = random_weight((64, 256))
    for tokens in (1, 6, 70):
        # A power of two: it makes no difference whether u is rounded before it is scaled as well.
        p = random_qlora(tokens, weight, 8, dtype, torch.float32, scaling=2.0)
        y, xa = forward(isa, p)
        assert y.dtype == xa.dtype == dtype
        grad_x, *gradients = backward(isa, p, xa)
        assert grad_x.dtype == dtype
        u = (p.scaling * (p.grad_y.double() @ p.lora_b.to(dtype).double())).float().to(dtype)
        exact_a = u.double().T @ p.x.double()
        exact_b = p.scaling * (p.grad_y.double().T @ xa.double())
        for got, exact in zip(gradients, (exact_a, exact_b), strict=True):
            assert got.dtype == torch.float32
            # Far below the roundoff of x's dtype, though u may round another way here and there.
            error = (got.double() - exact).norm() / exact.norm()
            assert error < torch.finfo(dtype).eps / 50


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
def test_dropout_is_that_of_the_reference(isa: int, dropout_p: float, dtype: torch.dtype) -> None:
    # Odd K: rows begin at every place in the groups of four words.
    weight = random_weight((48, 131), 32)
    for tokens in (1, 7, 71):
        p = random_qlora(tokens, weight, 6, dtype, dropout_p=dropout_p, seed=tokens)
        plain = dataclasses.replace(p, dropout_p=0.0, seed=None)
        masked = plain.with_x(dropout_reference(p.x, dropout_p, p.seed))
        y, xa = forward(isa, p)
        assert_bitwise_equal(xa, forward(isa, masked)[1])
        grad_x, grad_a, grad_b = backward(isa, p, xa)
        _, masked_a, masked_b = backward(isa, masked, xa)
        assert_bitwise_equal(grad_a, masked_a)
        assert_bitwise_equal(grad_b, masked_b)
        # The base sees the whole x, and grad_x passes where an element was dropped.
        dropped = dropout_reference(torch.ones_like(p.x), dropout_p, p.seed) == 0
        base = quantized_matmul_backward_input_cpu(isa, p.grad_y, weight)
        assert_bitwise_equal(grad_x[dropped], base[dropped])
        assert (grad_x != base)[~dropped].float().mean() > 0.8
        assert_qlora(y, xa, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_of_everything(isa: int, dtype: torch.dtype) -> None:
    weight = random_weight((33, 96))
    for tokens in (1, 5, 70):
        p = random_qlora(tokens, weight, 4, dtype, dropout_p=1.0)
        y, xa = forward(isa, p)
        assert not xa.any()
        assert_bitwise_equal(y + 0.0, quantized_matmul_cpu(isa, p.x, weight) + 0.0)
        grad_x, grad_a, grad_b = backward(isa, p, xa)
        base = quantized_matmul_backward_input_cpu(isa, p.grad_y, weight)
        assert_bitwise_equal(grad_x, base)
        assert not grad_a.any() and not grad_b.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dropped_nan_does_not_reach_the_adapter(isa: int, dtype: torch.dtype) -> None:
    weight = random_weight((33, 96))
    for tokens in (2, 5, 70):
        p = random_qlora(tokens, weight, 4, dtype, dropout_p=0.5)
        dropped = dropout_reference(torch.ones_like(p.x), 0.5, p.seed) == 0
        x = torch.where(dropped, torch.tensor(math.nan, dtype=dtype), p.x)
        y, xa = forward(isa, p.with_x(x))
        assert y.isnan().all()
        assert_bitwise_equal(xa, forward(isa, p)[1])
        _, grad_a, grad_b = backward(isa, p.with_x(x), xa)
        assert grad_a.isfinite().all() and grad_b.isfinite().all()
        # In backward the product u A is NaN in a row; where it was dropped grad_x is the base's.
        bad = dataclasses.replace(p, lora_a=torch.full_like(p.lora_a, math.nan))
        grad_x = backward(isa, bad, xa, (True, False, False))[0]
        assert torch.equal(grad_x.isnan(), ~dropped)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_stays_alone(isa: int, dtype: torch.dtype, bad: float) -> None:
    for shape, rank in (((17, 100), 3), ((64, 256), 40)):
        for tokens in (2, 5, 70):
            p = random_qlora(tokens, random_weight(shape), rank, dtype)
            p.x[1, 50], p.grad_y[1, 9] = bad, bad
            y, xa = forward(isa, p)
            grad_x = backward(isa, p, xa)[0]
            others = torch.arange(tokens) != 1
            for result in (y, xa, grad_x):
                assert not result[1].isfinite().any() and result[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qlora_takes_any_strides(isa: int, dtype: torch.dtype) -> None:
    weight = random_weight((33, 96), 32, "nested")
    for tokens in (1, 6, 70):
        p = random_qlora(tokens, weight, 6, dtype, bias_dtype=dtype, dropout_p=0.2)
        y, xa = forward(isa, p)
        gradients = backward(isa, p, xa)
        turned = {
            name: getattr(p, name).t().contiguous().t()
            for name in ("x", "grad_y", "lora_a", "lora_b")
        }
        assert p.bias is not None
        q = dataclasses.replace(p, **turned, bias=p.bias.repeat_interleave(2)[::2])
        turned_y, turned_xa = forward(isa, q)
        turned_gradients = backward(isa, q, xa.t().contiguous().t())
        assert_qlora(turned_y, turned_xa, p)
        assert_qlora_backward(turned_gradients, p)
        if choose_path(tokens, 33, 96, dtype, isa) == "panels":
            continue  # Torch's GEMM may take another order of additions for another layout.
        for got, wanted in zip(
            (turned_y, turned_xa, *turned_gradients), (y, xa, *gradients), strict=True
        ):
            assert_bitwise_equal(got, wanted)


@pytest.mark.parametrize("shape", [(65, 257), (40, 256), (130, 1030)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_rows(isa: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    p = random_qlora(70, random_weight(shape, 64, "nested"), 7, dtype, bias_dtype=dtype)
    y, xa = forward(isa, p, invariant=True)
    assert_qlora(y, xa, p)
    for begin, end in ((0, 1), (69, 70), (3, 6), (5, 22), (0, 33), (30, 70)):
        part_y, part_xa = forward(isa, p.with_x(p.x[begin:end]), invariant=True)
        assert_bitwise_equal(part_y, y[begin:end])
        assert_bitwise_equal(part_xa, xa[begin:end])
    others = torch.randn_like(p.x) * 100
    others[11] = p.x[11]
    among_y, among_xa = forward(isa, p.with_x(others), invariant=True)
    assert_bitwise_equal(among_y[11], y[11])
    assert_bitwise_equal(among_xa[11], xa[11])


@pytest.mark.parametrize("shape", [(65, 257), (256, 512), (2600, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_paths_do_not_depend_on_the_threads(
    isa: int, dtype: torch.dtype, shape: tuple[int, int], one_thread_then_two: tuple[int, int]
) -> None:
    # Panels go through torch's GEMM, which promises nothing of the kind.
    weight = random_weight(shape, 64, "nested")
    for tokens in (1, 2, 20, 260):
        if choose_path(tokens, *shape, dtype, isa) == "panels":
            continue
        p = random_qlora(tokens, weight, 9, dtype, torch.float32, dropout_p=0.1)
        results = []
        for threads in one_thread_then_two:
            torch.set_num_threads(threads)
            y, xa = forward(isa, p)
            results.append((y, xa, *backward(isa, p, xa)))
        for one, two in zip(*results, strict=True):
            assert_bitwise_equal(one, two)


def test_bindings_reject_what_would_corrupt_memory(isa: int) -> None:
    p = random_qlora(3, random_weight((8, 64)), 4, torch.float32)
    _, xa = forward(isa, p)
    narrow_a = dataclasses.replace(p, lora_a=p.lora_a[:, 1:])
    with pytest.raises(RuntimeError, match=r"lora_a must be a contiguous CPU tensor \[tokens, 64"):
        forward(isa, narrow_a)
    other_rank = dataclasses.replace(p, lora_b=p.lora_b[:, 1:])
    with pytest.raises(RuntimeError, match=r"lora_b must be a contiguous CPU tensor \[tokens, 4"):
        forward(isa, other_rank)
    short = dataclasses.replace(p, lora_b=p.lora_b[1:])
    with pytest.raises(RuntimeError, match="lora_b must have 8 rows, got 7"):
        forward(isa, short)
    with pytest.raises(RuntimeError, match="xa must have 12 elements, got 8"):
        backward(isa, p, xa[1:])
    with pytest.raises(RuntimeError, match="dropped must have 192 elements, got 128"):
        backward(isa, p.with_x(p.x[1:]), xa, (False, True, False))
    with pytest.raises(RuntimeError, match="lora_a must be float32, float16 or bfloat16"):
        forward(isa, dataclasses.replace(p, lora_a=p.lora_a.double()))
