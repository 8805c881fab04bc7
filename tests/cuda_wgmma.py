"""The Hopper matmul's launcher called through a runner, and what it must compute there."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qlora_kernels.backends.cuda.wgmma import WgmmaTile, scratch_sizes
from qlora_kernels.formats import Codebook, list_formats
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.cuda_matmuls import HALVES, matmul_operands
from tests.emulation.cuda.runner import Runner
from tests.problems import random_qlora, random_weight
from tests.tolerances import assert_matmul, assert_qlora

# Columns of a group's projection, of which other adapters have the rest.
GAP = 3


def wgmma_matmul(
    runner: Runner,
    seed: int,
    x: torch.Tensor,
    weight: WeightOperands,
    tile: tuple[int, int] = (128, 32),
    blocks: int = 1,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 0.0,
) -> torch.Tensor:
    """y [M,N] by `tile` (rows of the weight, tokens) and `blocks` that share the work; with `xa`
    [M,R] and `lora_b` [N,R], the adapter's term is added."""
    tokens, (rows, cols) = len(x), weight.shape
    rank = 0 if lora_b is None else lora_b.shape[1]
    scratch = scratch_sizes(tokens, rows, cols, rank, WgmmaTile(*tile, blocks))
    operands = matmul_operands(x, weight, bias, xa, lora_b, GAP)
    got = runner.call(
        "wgmma_matmul",
        seed=seed,
        integers={
            **operands.integers,
            "tile_rows": tile[0],
            "tile_tokens": tile[1],
            "blocks": blocks,
        },
        reals={"scaling": scaling},
        inputs=operands.inputs,
        outputs={
            "y": torch.empty(tokens, rows, dtype=x.dtype),
            "partials": torch.empty(scratch.partials),
            "arranged": torch.empty(scratch.arranged, dtype=x.dtype),
        },
        changed={"tickets": torch.zeros(scratch.tickets, dtype=torch.int32)},
    )
    assert not got["tickets"].any(), "tickets are left for the next launch"
    return got["y"]


def _x(tokens: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_wgmma_every_place(runner: Runner, seed: int) -> None:
    """A one-hot x picks single weights: exact, so that no two places can be exchanged unseen."""
    weight = random_weight((128, 128), 64, seed=9)
    values = weight.codebook.to(torch.bfloat16).float()
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], dim=1).reshape(128, 128)
    assert weight.absmax is not None
    scales = weight.absmax.reshape(128, 2).repeat_interleave(64, dim=1)
    # A sum that begins at 0 never ends at -0.
    expected = (values[codes.long()] * scales + 0.0).t().to(torch.bfloat16)
    one_hot = torch.eye(128, dtype=torch.bfloat16)
    assert_bitwise_equal(wgmma_matmul(runner, seed, one_hot, weight, (128, 128)), expected)


def check_wgmma_shapes(runner: Runner, seed: int) -> None:
    """Every tile; ragged M and N, K of less and more than a stage and than the pipeline."""
    problems = (
        (40, (130, 320), 64, (128, 32)),
        (33, (257, 1088), 256, (256, 32)),
        (17, (64, 64), 64, (128, 64)),
        (65, (300, 192), 128, (256, 64)),
        (129, (129, 448), 64, (128, 128)),
        (100, (256, 576), 64, (256, 128)),
    )
    for i, (tokens, shape, block_size, tile) in enumerate(problems):
        scales = ("absmax", "nested")[(i + i // 2) % 2]
        weight = random_weight(shape, block_size, scales, seed=i)
        x = _x(tokens, shape[1], HALVES[(i + seed) % 2], i)
        bias = None if i == 2 else torch.randn(shape[0]).to((torch.float32, *HALVES)[i % 3])
        y = wgmma_matmul(runner, seed, x, weight, tile, 1, bias)
        assert_matmul(y, x, weight, bias)


def check_wgmma_tables(runner: Runner, seed: int) -> None:
    """Any table: each code's value reaches the product from either nibble."""
    table = Codebook("odd", values=[0.5, -1.0, 0.25, 0.125, -0.75])
    # Every format in turn: a part of them in each order of the threads.
    for codebook in ("fp4", table, *list_formats()[seed % 4 :: 4]):
        weight = random_weight((40, 128), 64, codebook=codebook, seed=3)
        x = _x(18, 128, HALVES[seed % 2], seed)
        assert_matmul(wgmma_matmul(runner, seed, x, weight), x, weight)


def check_wgmma_shared_tiles(runner: Runner, seed: int) -> None:
    """Blocks that share tiles, whatever order they run in: the same bits for the same number. In
    fp16, which shows more of them than bf16."""
    weight = random_weight((131, 1344), 64, "nested", seed=1)
    x = _x(45, 1344, torch.float16, 5)
    for tile, blocks in (((128, 32), 24), ((256, 64), 2)):
        y = wgmma_matmul(runner, seed, x, weight, tile, blocks)
        assert_matmul(y, x, weight)
        assert_bitwise_equal(wgmma_matmul(runner, seed + 17, x, weight, tile, blocks), y)


def check_wgmma_adapters(runner: Runner, seed: int) -> None:
    """Ranks around the k of a product and a chunk, adapters of every dtype, shared tiles too."""
    problems = ((3, (128, 32), 1), (16, (256, 128), 3), (17, (128, 64), 4), (70, (128, 128), 2))
    for i, (rank, tile, blocks) in enumerate(problems):
        weight = random_weight((190, 576), 64, ("absmax", "nested")[i % 2], seed=i)
        p = random_qlora(
            (20, 35, 64, 70)[i],
            weight,
            rank,
            HALVES[(i + seed) % 2],
            (torch.float32, *HALVES)[i % 3],
            bias_dtype=(None, torch.float32, *HALVES)[i % 4],
            seed=i,
        )
        xa = F.linear(p.x, p.lora_a.to(p.x.dtype))
        y = wgmma_matmul(runner, seed, p.x, weight, tile, blocks, p.bias, xa, p.lora_b, p.scaling)
        assert_qlora(y, xa, p)


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}
