"""The matmuls' launchers called through a runner, and what they must compute there."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlora_kernels.formats import Codebook, list_formats
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import dropout_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.cuda_codecs import DTYPE_NUMBERS
from tests.emulation.cuda.runner import Runner
from tests.problems import DTYPES, QLoRAProblem, random_qlora, random_weight
from tests.tolerances import assert_matmul, assert_qlora

HALVES = (torch.bfloat16, torch.float16)
TILE_N = 128  # qlk/cuda/launch.h


def _columns(tokens: int) -> int:
    """Token columns of a block's tile: launch.h, fused_matmul_tokens."""
    return 8 if tokens <= 8 else 16 if tokens <= 16 else 32


def fused_matmul(
    runner: Runner,
    seed: int,
    x: torch.Tensor,
    weight: WeightOperands,
    bias: torch.Tensor | None = None,
    splits: int = 1,
    xa: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 0.0,
    xa_gap: int = 0,
    adapter: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M,N]; with `xa` [M,R] and `lora_b` [N,R], the adapter's term is added. `xa_gap`: other
    columns between the rows of xa. With an `adapter` [S,K] in place of xa, x · adapterᵀ is launched
    ahead of the product, and xa is its first R columns."""
    tokens, rows = len(x), weight.shape[0]
    tiles = -(-tokens // _columns(tokens)) * -(-rows // TILE_N)
    projected = {}
    if adapter is not None:
        projected = {"result": torch.empty(tokens, len(adapter), dtype=x.dtype)}
        xa_gap = len(adapter)
    operands = matmul_operands(x, weight, bias, xa, lora_b, xa_gap)
    got = runner.call(
        "projected_matmul" if projected else "fused_matmul",
        seed=seed,
        integers={
            **operands.integers,
            "adapter_dtype": 0 if adapter is None else DTYPE_NUMBERS[adapter.dtype],
            "splits": splits,
        },
        reals={"scaling": scaling},
        inputs={**operands.inputs, "adapter": adapter},
        outputs={
            **projected,
            "y": torch.empty(tokens, rows, dtype=x.dtype),
            "partials": torch.empty(tiles * splits * TILE_N * _columns(tokens)),
        },
        changed={"tickets": torch.zeros(tiles, dtype=torch.int32)},
    )
    assert not got["tickets"].any(), "tickets are left for the next launch"
    return got["y"]


class Operands(NamedTuple):
    """What a request of every matmul has."""

    integers: dict[str, int]
    inputs: dict[str, torch.Tensor | None]


def matmul_operands(
    x: torch.Tensor,
    weight: WeightOperands,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    xa_gap: int,
) -> Operands:
    """`xa_gap`: other columns between the rows of xa."""
    rows, cols = weight.shape
    return Operands(
        {
            "scale_block_size": weight.scale_block_size,
            "rows": rows,
            "cols": cols,
            "block_size": weight.block_size,
            "dtype": DTYPE_NUMBERS[x.dtype],
            "tokens": len(x),
            "bias_dtype": 0 if bias is None else DTYPE_NUMBERS[bias.dtype],
            "lora_b_dtype": 0 if lora_b is None else DTYPE_NUMBERS[lora_b.dtype],
            "rank": 0 if lora_b is None else lora_b.shape[1],
            "xa_stride": xa_gap + (0 if xa is None else xa.shape[1]),
        },
        {
            "codes": weight.codes,
            "codebook": weight.codebook,
            "absmax": weight.absmax,
            "scale_codes": weight.scale_codes,
            "scale_absmax": weight.scale_absmax,
            "scale_offset": weight.scale_offset,
            "scale_codebook": weight.scale_codebook,
            "x": x,
            "bias": bias,
            "xa": None if xa is None else with_gap(xa, xa_gap),
            "lora_b": lora_b,
        },
    )


def with_gap(xa: torch.Tensor, columns: int) -> torch.Tensor:
    """xa's rows with NaN between them, and nothing behind the last."""
    wide = torch.nn.functional.pad(xa, (0, columns), value=float("nan")).reshape(-1)
    return wide[: wide.numel() - columns] if len(xa) else wide


def down_projection(
    runner: Runner, seed: int, x: torch.Tensor, adapter: torch.Tensor
) -> torch.Tensor:
    """x · adapterᵀ [M,R]."""
    return runner.call(
        "down_projection",
        seed=seed,
        integers={
            "dtype": DTYPE_NUMBERS[x.dtype],
            "adapter_dtype": DTYPE_NUMBERS[adapter.dtype],
            "tokens": len(x),
            "cols": x.shape[1],
            "rank": len(adapter),
        },
        inputs={"x": x, "adapter": adapter},
        outputs={"result": torch.empty(len(x), len(adapter), dtype=x.dtype)},
    )["result"]


def dropout(
    runner: Runner,
    seed: int,
    x: torch.Tensor,
    dropout_p: float,
    dropout_seed: torch.Tensor,
    misaligned: bool = False,
) -> torch.Tensor:
    """x [numel] with elements dropped; `misaligned`: it starts behind a 16-byte boundary."""
    shifted = torch.cat([x.new_zeros(1), x]) if misaligned else x
    return runner.call(
        "dropout",
        seed=seed,
        integers={
            "dtype": DTYPE_NUMBERS[x.dtype],
            "numel": x.numel(),
            "x_shift": x.element_size() if misaligned else 0,
        },
        reals={"dropout_p": dropout_p},
        inputs={"x": shifted, "seed": dropout_seed},
        outputs={"out": torch.empty_like(x)},
    )["out"]


def _x(tokens: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_tokens(runner: Runner, seed: int) -> None:
    """Around every tile of tokens, with both kinds of scales."""
    for i, tokens in enumerate((1, 2, 7, 8, 9, 16, 17, 32, 33)):
        weight = random_weight((136, 320), 64, ("absmax", "nested")[i % 2], seed=i)
        x = _x(tokens, 320, HALVES[(i + seed) % 2], i)
        assert_matmul(fused_matmul(runner, seed, x, weight), x, weight)


def check_shapes(runner: Runner, seed: int) -> None:
    """Ragged N, K of less and more than a tile and a pipeline, blocks that straddle rows."""
    shapes = ((1, 64), (5, 128), (129, 192), (100, 448), (16, 1088), (260, 64))
    for i, shape in enumerate(shapes):
        for block_size in (64, 256):
            scales = ("absmax", "nested")[(i + block_size // 64) % 2]
            weight = random_weight(shape, block_size, scales, seed=i)
            x = _x(3 + 9 * (i % 2), shape[1], HALVES[(i + seed) % 2], i)
            bias = torch.randn(shape[0]).to((torch.float32, *HALVES)[i % 3])
            assert_matmul(fused_matmul(runner, seed, x, weight, bias), x, weight, bias)


def check_tables(runner: Runner, seed: int) -> None:
    """Any table: each code's value reaches the product from either nibble."""
    table = Codebook("odd", values=[0.5, -1.0, 0.25, 0.125, -0.75])
    # Every format in turn: a third of them in each order of the threads.
    for codebook in ("fp4", "int4", table, *list_formats()[seed % 3 :: 3]):
        weight = random_weight((40, 256), 64, codebook=codebook, seed=3)
        x = _x(5, 256, HALVES[seed % 2], seed)
        assert_matmul(fused_matmul(runner, seed, x, weight), x, weight)


def check_every_place(runner: Runner, seed: int) -> None:
    """A one-hot x picks single weights: exact, so that no two places can be exchanged unseen."""
    weight = random_weight((128, 128), 64, seed=9)
    values = weight.codebook.to(torch.bfloat16).float()
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], dim=1).reshape(128, 128)
    assert weight.absmax is not None
    scales = weight.absmax.reshape(128, 2).repeat_interleave(64, dim=1)
    # A sum that begins at 0 never ends at -0.
    expected = (values[codes.long()] * scales + 0.0).t().to(torch.bfloat16)
    one_hot = torch.eye(128, dtype=torch.bfloat16)
    for first in range(0, 128, 32):
        got = fused_matmul(runner, seed, one_hot[first : first + 32], weight)
        assert_bitwise_equal(got, expected[first : first + 32].contiguous())


def check_splits(runner: Runner, seed: int) -> None:
    """Splits of K, whatever order their blocks run in, give the same bits for the same count."""
    weight = random_weight((200, 1024), 64, "nested", seed=1)
    for tokens in (1, 12, 20):
        x = _x(tokens, 1024, torch.bfloat16, tokens)
        for splits in (2, 3, 8):
            y = fused_matmul(runner, seed, x, weight, splits=splits)
            assert_matmul(y, x, weight)
            assert_bitwise_equal(fused_matmul(runner, seed + 17, x, weight, splits=splits), y)


def check_batch_invariance(runner: Runner, seed: int) -> None:
    """A token's bits do not depend on how many others there are."""
    weight = random_weight((130, 640), 64, seed=2)
    problem = random_qlora(40, weight, 5, HALVES[seed % 2], torch.float32)
    whole_xa = down_projection(runner, seed, problem.x, problem.lora_a)
    arguments = (problem.lora_b, problem.scaling)
    whole = fused_matmul(runner, seed, problem.x, weight, None, 2, whole_xa, *arguments)
    for tokens in (1, 8, 9, 30):
        x = problem.x[:tokens]
        xa = down_projection(runner, seed, x, problem.lora_a)
        assert_bitwise_equal(xa, whole_xa[:tokens])
        y = fused_matmul(runner, seed, x, weight, None, 2, xa, *arguments)
        assert_bitwise_equal(y, whole[:tokens])


def _check_adapter(runner: Runner, seed: int, problem: QLoRAProblem, splits: int) -> None:
    xa = down_projection(runner, seed, problem.x, problem.lora_a)
    y = fused_matmul(
        runner,
        seed,
        problem.x,
        problem.weight,
        problem.bias,
        splits,
        xa,
        problem.lora_b,
        problem.scaling,
        xa_gap=5 * splits,
    )
    assert_qlora(y, xa, problem)


def check_projections_launched_ahead(runner: Runner, seed: int) -> None:
    """The bits of two launches apart, though the second starts first where it can."""
    for i, (tokens, splits) in enumerate(((1, 1), (5, 3), (20, 2))):
        weight = random_weight((136, 320), 64, ("absmax", "nested")[i % 2], seed=i)
        problem = random_qlora(tokens, weight, 8, HALVES[i % 2], torch.float32, seed=i)
        arguments = {"splits": splits, "lora_b": problem.lora_b, "scaling": problem.scaling}
        xa = down_projection(runner, seed, problem.x, problem.lora_a)
        apart = fused_matmul(runner, seed, problem.x, weight, xa=xa, **arguments)
        adapter = torch.cat([problem.lora_a, problem.lora_a[: 3 * i].flip(0)])
        y = fused_matmul(runner, seed, problem.x, weight, adapter=adapter, **arguments)
        assert_bitwise_equal(y, apart, f"{tokens} tokens, {splits} splits")


def check_adapters(runner: Runner, seed: int) -> None:
    """Ranks around the k of an mma, adapters of every dtype, with and without a bias."""
    for i, rank in enumerate((1, 3, 8, 16, 17, 40)):
        weight = random_weight((136, 320), 64, ("absmax", "nested")[i % 2], seed=i)
        adapter_dtype = (torch.float32, *HALVES)[i % 3]
        problem = random_qlora(
            (1, 4, 8, 13, 16, 20)[(i + seed) % 6],
            weight,
            rank,
            HALVES[i // 3],
            adapter_dtype,
            bias_dtype=(None, torch.float32, *HALVES)[i % 4],
            seed=i,
        )
        _check_adapter(runner, seed, problem, 1 + i % 3)


def check_down_projection_of_ragged_rows(runner: Runner, seed: int) -> None:
    """Rows that are no multiple of a vector, and more columns than a block takes at once."""
    generator = torch.Generator().manual_seed(seed)
    for cols in (1, 7, 100, 2055, 4096):
        x = torch.randn(9, cols, generator=generator).to(HALVES[cols % 2])
        adapter = torch.randn(2, cols, generator=generator)
        got = down_projection(runner, seed, x, adapter)
        rounded = adapter.to(x.dtype).double()
        exact = x.double() @ rounded.T
        magnitude = x.double().abs() @ rounded.abs().T
        bound = torch.finfo(x.dtype).eps * exact.abs() + cols * 2.0**-24 * magnitude
        assert ((got.double() - exact).abs() <= bound).all()


def check_dropout(runner: Runner, seed: int) -> None:
    """Bit for bit the reference's mask, for any seed and size, NaN dropped to 0."""
    for i, numel in enumerate((1, 3, 8, 100, 6149, 20_000)):
        x = torch.randn(numel, generator=torch.Generator().manual_seed(i))
        x[numel // 2] = float("nan")
        x = x.to(DTYPES[(i + seed) % 3])
        for p, number in ((0.1, 7), (0.5, -1), (1.0, 3), (0.25, -(2**63) + i)):
            dropout_seed = torch.tensor([number], dtype=torch.int64)
            got = dropout(runner, seed, x, p, dropout_seed, misaligned=bool(i % 2))
            assert_bitwise_equal(got, dropout_reference(x, p, dropout_seed), f"{numel} {p}")


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}
