"""The launchers of the adapter's gradients called through a runner, and what they must compute."""

from __future__ import annotations

import torch

from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal
from tests.cuda_codecs import DTYPE_NUMBERS
from tests.emulation.cuda.runner import Runner

HALVES = (torch.bfloat16, torch.float16)


def columns_of(rank: int, both: bool) -> int:
    """Columns of a block's tile: qlk/cuda/launch.h, low_rank_gradient_tile."""
    return 256 if rank > 32 and both else 512


def low_rank_gradient(
    runner: Runner,
    seed: int,
    data: torch.Tensor,
    left: torch.Tensor | None,
    token_slices: int = 1,
    *,
    rank_major: bool = False,
    lora_b: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    copy_stride: int = 0,
    misaligned: bool = False,
) -> dict[str, torch.Tensor]:
    """gradient_partials where there is a left, u_partials where there is a lora_b or lora_a; with
    `copy_stride` copy [M, stride].

    Args:
        data: [M,C].
        left: [M,R].
        lora_b: [C,R], or
        lora_a: [R,C].
        misaligned: data starts one element behind a 16-byte boundary.
    """
    right = lora_b if lora_a is None else lora_a
    tokens, cols = data.shape
    ranks = (left, lora_b, None if lora_a is None else lora_a.T)
    rank = next(matrix.shape[1] for matrix in ranks if matrix is not None)
    outputs = {}
    if left is not None:
        shape = (token_slices, rank, cols) if rank_major else (token_slices, cols, rank)
        outputs["gradient_partials"] = torch.empty(shape)
    if right is not None:
        tile = columns_of(rank, left is not None)
        outputs["u_partials"] = torch.empty(-(-cols // tile), tokens, rank)
    if copy_stride:
        outputs["copy"] = torch.empty(tokens, copy_stride, dtype=data.dtype)
    flat = data.reshape(-1)
    return runner.call(
        "low_rank_gradient",
        seed=seed,
        integers={
            "data_shift": data.element_size() if misaligned else 0,
            "dtype": DTYPE_NUMBERS[data.dtype],
            "tokens": tokens,
            "cols": cols,
            "rank": rank,
            "token_slices": token_slices,
            "rank_major": rank_major,
            "right_dtype": 0 if right is None else DTYPE_NUMBERS[right.dtype],
            "right_rank_major": lora_a is not None,
            "copy_stride": copy_stride,
        },
        inputs={
            "data": torch.cat([flat.new_zeros(1), flat]) if misaligned else flat,
            "left": left,
            "right": right,
        },
        outputs=outputs,
    )


def partial_sums(
    runner: Runner,
    seed: int,
    jobs: list[tuple[torch.Tensor, float, torch.dtype]],
    tail: tuple[int, int] | None = None,
) -> list[torch.Tensor]:
    """Partials [parts, rows, cols] summed over the first dimension, times a factor, in a dtype.

    With `tail` = (stride, columns) the first result is written once more, and comes back last.
    """
    integers, reals, inputs, outputs = {"count": len(jobs)}, {}, {}, {}
    for i, (partials, scaling, dtype) in enumerate(jobs):
        parts, rows, cols = partials.shape
        integers |= {f"parts{i}": parts, f"rows{i}": rows, f"cols{i}": cols}
        integers |= {f"dtype{i}": DTYPE_NUMBERS[dtype]}
        integers |= {f"tail_stride{i}": 0, f"tail_cols{i}": 0}
        reals[f"scaling{i}"] = scaling
        inputs[f"partials{i}"] = partials
        outputs[f"out{i}"] = torch.empty(rows, cols, dtype=dtype)
    if tail is not None:
        integers["tail_stride0"], integers["tail_cols0"] = tail
        rows, dtype = jobs[0][0].shape[1], jobs[0][2]
        outputs["tail0"] = torch.empty((rows - 1) * tail[0] + tail[1], dtype=dtype)
    got = runner.call(
        "partial_sums", seed=seed, integers=integers, reals=reals, inputs=inputs, outputs=outputs
    )
    return list(got.values())


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _assert_product(got: torch.Tensor, left: torch.Tensor, right: torch.Tensor, what: str) -> None:
    """fp32 `got` is left · right as well as a sum of fp32 products is, however it is ordered."""
    exact = left.double() @ right.double()
    magnitude = left.double().abs() @ right.double().abs()
    bound = (left.shape[1] + 4) * 2.0**-24 * magnitude
    wrong = ~((got.double() - exact).abs() <= bound)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} elements off"


def _check(
    runner: Runner,
    seed: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    token_slices: int = 1,
    *,
    rank_major: bool = False,
    lora_b_dtype: torch.dtype | None = None,
    misaligned: bool = False,
) -> None:
    tokens, cols, rank = sizes
    data = _random(tokens, cols, dtype=dtype, seed=seed)
    left = _random(tokens, rank, dtype=dtype, seed=seed + 1)
    lora_b = None
    if lora_b_dtype is not None:
        lora_b = _random(cols, rank, dtype=lora_b_dtype, seed=seed + 2)
    got = low_rank_gradient(
        runner,
        seed,
        data,
        left,
        token_slices,
        rank_major=rank_major,
        lora_b=lora_b,
        misaligned=misaligned,
    )
    what = f"M, C, R = {sizes}, {token_slices} slices, {dtype}, seed {seed}"
    gradient = got["gradient_partials"].double().sum(0)
    _assert_product(gradient.T if rank_major else gradient, data.T, left, f"gradient of {what}")
    if lora_b is not None:
        u = got["u_partials"].double().sum(0)
        _assert_product(u, data, lora_b.to(dtype), f"u of {what}")


def check_gradient_sizes(runner: Runner, seed: int) -> None:
    """Around a tile of tokens, a warp's and a block's columns, a vector; one matrix alone."""
    sizes = ((1, 1, 1), (3, 7, 2), (16, 64, 8), (17, 65, 16), (40, 72, 5), (33, 513, 3))
    for i, size in enumerate((*sizes, (50, 528, 16))):
        major = bool((i + seed) % 2)
        _check(runner, i + seed, size, HALVES[(i + seed) % 2], 1 + i % 2, rank_major=major)


def check_gradient_and_u(runner: Runner, seed: int) -> None:
    """Both products of one pass, adapters of every dtype."""
    sizes = ((1, 1, 1), (20, 100, 4), (49, 256, 16), (16, 520, 9), (70, 65, 8), (32, 1100, 2))
    for i, size in enumerate(sizes):
        adapter_dtype = (torch.float32, *HALVES)[(i + seed) % 3]
        _check(runner, i + seed, size, HALVES[i % 2], 1 + i % 3, lora_b_dtype=adapter_dtype)


def check_gradient_ranks(runner: Runner, seed: int) -> None:
    """Around what a block takes at once, and several of them; of many ranks also more columns than
    a warp's and a block's, and more tiles than stages."""
    for i, rank in enumerate((15, 17, 31, 32, 33, 48, 64, 96, 100, 128)):
        dtype = HALVES[(i + seed) % 2]
        _check(runner, i, (20, 40, rank), dtype, rank_major=bool(i % 2))
        _check(runner, i, (20, 40, rank), dtype, 2, lora_b_dtype=torch.float32)
    _check(runner, seed, (70, 300, 48), HALVES[seed % 2], 1, lora_b_dtype=torch.float32)
    _check(runner, seed, (35, 530, 64), HALVES[seed % 2], 2, rank_major=True)


def check_gradient_misaligned(runner: Runner, seed: int) -> None:
    """Data behind a 16-byte boundary goes by elements."""
    _check(runner, seed, (35, 136, 5), HALVES[seed % 2], misaligned=True)
    _check(runner, seed, (35, 136, 5), HALVES[seed % 2], 2, lora_b_dtype=torch.float32)


def check_gradient_pipeline(runner: Runner, seed: int) -> None:
    """More tiles than stages, and slices of unequal length: each slice has its own tokens."""
    for slices in (1, 3, 4):
        _check(runner, seed, (165, 64, 4), HALVES[seed % 2], slices, lora_b_dtype=torch.bfloat16)
    data = _random(100, 64, dtype=torch.float16, seed=seed)
    left = _random(100, 4, dtype=torch.float16, seed=seed + 1)
    got = low_rank_gradient(runner, seed, data, left, 3)["gradient_partials"]
    # Seven tiles: two, two and three of them.
    for part, (begin, end) in enumerate(((0, 32), (32, 64), (64, 100))):
        _assert_product(got[part], data[begin:end].T, left[begin:end], f"slice {part}")


def check_gradient_copy(runner: Runner, seed: int) -> None:
    """The copy has data's bits, and nothing is written between its rows."""
    for tokens, cols, stride in ((1, 8, 16), (37, 520, 536), (16, 64, 64)):
        data = _random(tokens, cols, dtype=torch.bfloat16, seed=tokens)
        left = _random(tokens, 20, dtype=torch.bfloat16, seed=1)
        lora_b = _random(cols, 20, dtype=torch.float32, seed=2)
        got = low_rank_gradient(runner, seed, data, left, lora_b=lora_b, copy_stride=stride)["copy"]
        assert_bitwise_equal(got[:, :cols].contiguous(), data)
        assert (got[:, cols:].view(torch.int16) == -1).all(), "written between rows"


def check_projection(runner: Runner, seed: int) -> None:
    """u alone, of an adapter that is stored by ranks, and the copy beside it."""
    sizes = ((1, 8, 1), (20, 104, 4), (49, 520, 17), (33, 72, 40), (100, 64, 16), (40, 520, 64))
    for i, (tokens, cols, rank) in enumerate(sizes):
        dtype = HALVES[(i + seed) % 2]
        data = _random(tokens, cols, dtype=dtype, seed=i)
        lora_a = _random(rank, cols, dtype=(torch.float32, *HALVES)[(i + seed) % 3], seed=i + 1)
        stride = cols + 8 * (i % 2)
        got = low_rank_gradient(
            runner, seed, data, None, 1 + i % 3, lora_a=lora_a, copy_stride=stride
        )
        assert set(got) == {"u_partials", "copy"}
        u = got["u_partials"].double().sum(0)
        _assert_product(u, data, lora_a.to(dtype).T, f"u of {tokens, cols, rank}, seed {seed}")
        assert_bitwise_equal(got["copy"][:, :cols].contiguous(), data)
    data = _random(20, 77, dtype=torch.float16, seed=3)
    lora_a = _random(3, 77, dtype=torch.float32, seed=4)
    u = low_rank_gradient(runner, seed, data, None, lora_a=lora_a)["u_partials"].double().sum(0)
    _assert_product(u, data, lora_a.to(torch.float16).T, "u of ragged rows")


def check_gradient_order(runner: Runner, seed: int) -> None:
    """The same bits in any order of threads and blocks."""
    data = _random(130, 600, dtype=torch.bfloat16, seed=3)
    left = _random(130, 16, dtype=torch.bfloat16, seed=4)
    lora_b = _random(600, 16, dtype=torch.float32, seed=5)
    first = low_rank_gradient(runner, seed, data, left, 4, lora_b=lora_b)
    second = low_rank_gradient(runner, seed + 23, data, left, 4, lora_b=lora_b)
    for name, mine in first.items():
        assert_bitwise_equal(mine, second[name], name)


def check_partial_sums(runner: Runner, seed: int) -> None:
    """Added in order in fp32, scaled, rounded once; the tail holds the same and zeros."""
    shapes = ((1, 1, 1), (3, 5, 7), (8, 40, 16), (2, 700, 3), (5, 0, 4))
    for i, shape in enumerate(shapes):
        jobs, expected = [], []
        for j, dtype in enumerate((torch.float32, HALVES[(i + seed) % 2])):
            partials = _random(*shape, dtype=torch.float32, seed=i + j)
            total = torch.zeros(shape[1:])
            for k in range(shape[0]):
                total = total + partials[k] if k else partials[0]
            jobs.append((partials, 0.3 + j, dtype))
            expected.append((total * torch.tensor(0.3 + j)).to(dtype))
        for got, right in zip(partial_sums(runner, seed, jobs), expected, strict=True):
            assert_bitwise_equal(got, right, f"{shape}, seed {seed}")
        if shape[1] == 0:
            continue
        stride, width = shape[2] + 11, shape[2] + 3
        single, tail = partial_sums(runner, seed, jobs[1:], (stride, width))
        assert_bitwise_equal(single, expected[1])
        rows = torch.cat([tail, tail.new_zeros(stride - width)]).reshape(-1, stride)
        assert_bitwise_equal(rows[:, : shape[2]].contiguous(), expected[1])
        assert not rows[:, shape[2] : width].any(), "the tail is padded with zeros"
        between = rows[:-1, width:].contiguous().view(torch.int16)
        assert (between == -1).all(), "written between rows"


def check_gradient_is_as_accurate_as_torch(runner: Runner, seed: int) -> None:
    """Both launches together, against torch.mm of the same operands, in the adapter's dtype."""
    dtype = HALVES[seed % 2]
    data = _random(300, 96, dtype=dtype, seed=6)
    left = _random(300, 8, dtype=dtype, seed=7)
    got = low_rank_gradient(runner, seed, data, left, 4)["gradient_partials"]
    for out_dtype in (torch.float32, dtype):
        gradient = partial_sums(runner, seed, [(got, 1.75, out_dtype)])[0]
        exact = 1.75 * (data.double().T @ left.double())
        torchs = (data.to(out_dtype).T @ left.to(out_dtype)) * 1.75
        assert_as_accurate(gradient, exact, torchs)


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}
