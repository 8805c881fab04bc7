"""Every Triton kernel in the configurations it really runs in, on meta tensors, with what its
machine code must look like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qlora_kernels.backends.device import A100, B200, H200, DeviceFacts
from qlora_kernels.backends.launch_config import (
    MatmulSizes,
    backward_config,
    few_tokens_config,
    forward_config,
)
from qlora_kernels.backends.triton.dequantize import (
    MOST_WEIGHTS,
    dequantize_launch,
    dequantize_many_launch,
)
from qlora_kernels.backends.triton.double_quantize import double_quantize_launches
from qlora_kernels.backends.triton.dropout import dropout_launch
from qlora_kernels.backends.triton.launch import Launch
from qlora_kernels.backends.triton.low_rank import (
    down_gradient_launches,
    down_launches,
    reduce_launch,
    up_gradient_launches,
)
from qlora_kernels.backends.triton.quantize import quantize_launch
from qlora_kernels.backends.triton.quantized_matmul import (
    Down,
    Up,
    backward_launch,
    few_tokens_launches,
    forward_launches,
    one_token_launch,
)
from qlora_kernels.formats.quantized_weight import WeightOperands

FACTS: dict[int, DeviceFacts] = {facts.capability: facts for facts in (A100, H200, B200)}
# Instructions per element of the product for few tokens, of a weight with plain scales.
FEW_BUDGET = {80: 3.8, 90: 3.8, 100: 4.2}
FEW_BUDGET_16 = {80: 4.3, 90: 4.3, 100: 4.6}
# Cases for sm_80 and sm_100.
ELSEWHERE = (
    "dequantize-nested-torch.bfloat16",
    f"dequantize_many-{MOST_WEIGHTS}-nested",
    "quantize-torch.float32-decoded",
    "double_quantize-sum",
    "few-M1-absmax",
    "few-M16-nested",
    "forward-M64-absmax",
    "backward-M512-nested",
    "down-dropout",
    "down-gradient-dropout",
    "up-gradients",
)
# A layer of a 7B model.
N, K, R = 4096, 4096, 16
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A launch and what is asked of its code.

    Attributes:
        elements: of the large operand, that the hot loop (or the kernel) works on.
        budget: machine instructions per element, a thread's, by compute capability. Stated
            somewhat above what was compiled, so that a lost vector load or a spilled loop shows.
        narrow_loads: how many loads a thread makes of less than 16 bytes in the hot loop, for
            scales and tables; None: not asked.
        narrow_stores: the same of stores, over the whole kernel.
        tensor_cores: whether the hot loop multiplies on them.
        overlaps: whether it is a decoding loop that must not wait for its product on sm_90.
        permutes: PRMT instructions per eight elements that its hot loop decodes with, at least;
            None: it looks tables up, and has none of them to speak of.
    """

    name: str
    launch: Launch
    elements: int
    budget: dict[int, float]
    narrow_loads: int | None = 0
    narrow_stores: int | None = None
    tensor_cores: bool = False
    overlaps: bool = False
    permutes: int | None = None


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def meta_weight(
    rows: int, cols: int, block_size: int = 64, double_quant: bool = True
) -> WeightOperands:
    """A weight without data."""
    blocks = -(-rows * cols // block_size)
    codes = meta((rows * cols + 1) // 2, dtype=torch.uint8)
    rest = (meta(16), meta(256) if double_quant else None, (rows, cols), block_size, 256)
    if not double_quant:
        return WeightOperands(codes, meta(blocks), None, None, None, *rest)
    nested = (meta(blocks, dtype=torch.uint8), meta(-(-blocks // 256)), meta(1))
    return WeightOperands(codes, None, *nested, *rest)


def cases(capability: int) -> Iterator[Case]:
    """All cases for a GPU of that compute capability: every one for sm_90; for the others of each
    kernel the one that is hardest on registers, since the rest of them differs in nothing that a
    target could change."""
    for case in (*codec_cases(), *matmul_cases(capability), *low_rank_cases()):
        if capability == 90 or case.name in ELSEWHERE:
            yield case


def everywhere(budget: float) -> dict[int, float]:
    """The same budget for every capability."""
    return dict.fromkeys(FACTS, budget)


def codec_cases() -> Iterator[Case]:
    """Codecs and dropout. Dequantize loads 4 bytes of codes a lane, a whole line per warp, because
    eight codes make one 16-byte store; 17.7 instructions per element are what an H200 can issue
    while its memory streams."""
    for double_quant, dtype, budget in (
        (False, BF16, 12.0),
        (True, BF16, 14.5),
        (True, torch.float32, 20.0),
    ):
        weight = meta_weight(N, K, 64, double_quant)
        store = "nested" if double_quant else "absmax"
        flat = meta(1, N * K, dtype=dtype)
        yield Case(
            f"dequantize-{store}-{dtype}",
            dequantize_launch(weight, flat),
            4096,
            everywhere(budget),
            narrow_loads=None,
            narrow_stores=0,
        )
    for count, double_quant in ((2, False), (MOST_WEIGHTS, True)):
        weight = meta_weight(N, K, 64, double_quant)
        store = "nested" if double_quant else "absmax"
        # One of them with rows that are apart, as the extended forward wants them.
        outs = [meta(1, N * K, dtype=BF16)] * (count - 1) + [meta(N, K + 64, dtype=BF16)[:, :K]]
        launch = dequantize_many_launch([(weight, out) for out in outs])
        name = f"dequantize_many-{count}-{store}"
        yield Case(name, launch, 8192, everywhere(13.0), None, narrow_stores=0)
    flat = meta(1, N * K, dtype=torch.float32)
    huge, numel = meta_weight(1, 2**31 + 128), 2**31 + 128
    launch = dequantize_many_launch(
        [(meta_weight(N, K, 64, True), flat), (huge, meta(1, numel, dtype=torch.float32))],
    )
    yield Case("dequantize_many-huge", launch, 8192, everywhere(13.0), None, narrow_stores=0)
    pitched = meta(N, K + 16, dtype=BF16)[:, :K]
    launch = dequantize_launch(meta_weight(N, K), pitched)
    yield Case("dequantize-pitch", launch, 4096, everywhere(14.5), None, 0)
    ragged = meta(33, 1001, dtype=BF16)
    launch = dequantize_launch(meta_weight(33, 1001), ragged[:, :1000])
    yield Case("dequantize-ragged", launch, 1024, everywhere(90.0), None)

    for dtype, budget, scales, boundaries in (
        (BF16, 42.0, None, torch.float32),
        (torch.float32, 50.0, meta(N * K // 64), torch.float64),
    ):
        launch = quantize_launch(
            meta(N, K, dtype=dtype),
            meta(15, dtype=boundaries),
            meta(16, dtype=torch.uint8),
            7,
            64,
            scales,
            meta(N * K // 2, dtype=torch.uint8),
            meta(N * K // 64),
        )
        name = f"quantize-{dtype}" + ("" if scales is None else "-decoded")
        # The tables; a scale and twice as wide boundaries; one absmax is stored.
        narrow = 3 if scales is None else 12
        yield Case(name, launch, 4096, everywhere(budget), narrow, 1)
    blocks = N * K // 64
    total, offset, encode = double_quantize_launches(
        meta(blocks),
        meta(256),
        256,
        meta(blocks, dtype=torch.uint8),
        meta(blocks // 256),
        meta(1),
    )
    # Per scale, of which there is one for 64 weights.
    yield Case("double_quantize-sum", total, 512, everywhere(240.0), None)
    yield Case("double_quantize-offset", offset, 1024, everywhere(90.0))
    yield Case("double_quantize-encode", encode, 256, everywhere(120.0), None)
    seed = meta(1, dtype=torch.int64)
    x = meta(N, K, dtype=BF16)
    yield Case("dropout", dropout_launch(x, 0.1, seed, x), 1024, everywhere(34.0), None, 0)


def matmul_cases(capability: int) -> Iterator[Case]:
    """Products with Ŵ for the tiles that `launch_config` picks."""
    for double_quant in (False, True):
        yield from forward_cases(FACTS[capability], double_quant)
        yield from backward_cases(FACTS[capability], double_quant)


def forward_cases(facts: DeviceFacts, double_quant: bool) -> Iterator[Case]:
    """Few tokens, one in fp32, and the fused product."""
    weight = meta_weight(N, K, 64, double_quant)
    store = "nested" if double_quant else "absmax"
    # A scale; or its code and its second-level scale.
    narrow = 2 if double_quant else 1

    def operands(tokens: int, dtype: torch.dtype = BF16) -> tuple:
        up = Up(meta(N, R), meta(tokens, R, dtype=dtype), 1.0)
        return (
            meta(tokens, K, dtype=dtype),
            weight,
            meta(N),
            up,
            meta(tokens, N, dtype=dtype),
        )

    for tokens, dtype, budget in (
        (1, BF16, FEW_BUDGET),
        (16, BF16, FEW_BUDGET_16),
        (16, torch.float16, FEW_BUDGET_16),
        (32, BF16, everywhere(6.4)),
    ):
        if tokens != 1 and double_quant == (dtype == torch.float16):
            continue
        config = few_tokens_config(MatmulSizes(tokens, N, K, dtype, 64), facts)
        launch = few_tokens_launches(*operands(tokens, dtype), config)[0]
        name = f"few-M{tokens}-{store}" + ("-fp16" if dtype == torch.float16 else "")
        elements = config.tile_n * config.tile_k
        yield Case(
            name,
            launch,
            elements,
            {cc: most + (0.4 if double_quant else 0.0) for cc, most in budget.items()},
            narrow * (config.tile_n // 32),
            tensor_cores=True,
            permutes=16,
        )
    if double_quant:
        launch = one_token_launch(*operands(1, torch.float32))
        yield Case(f"one-token-{store}", launch, 16 * 1024, everywhere(6.6), narrow * 4)
    for tokens in (64, 512):
        config = forward_config(MatmulSizes(tokens, N, K, BF16, 64), facts)
        yield Case(
            f"forward-M{tokens}-{store}",
            forward_launches(*operands(tokens), config)[0],
            config.tile_n * config.tile_k,
            {80: 11.0, 90: 7.8, 100: 7.8},
            narrow + (double_quant and config.num_warps == 8),
            tensor_cores=True,
            overlaps=True,
            permutes=16 if facts.capability >= 90 else None,
        )


def backward_cases(facts: DeviceFacts, double_quant: bool) -> Iterator[Case]:
    """grad_x with dropout on the adapter."""
    weight = meta_weight(N, K, 64, double_quant)
    for tokens in (16, 64, 512):
        if (tokens == 64) == double_quant:
            continue
        config = backward_config(MatmulSizes(tokens, N, K, BF16, 64), facts)
        down = Down(meta(R, K), meta(tokens, R, dtype=BF16), 0.1, meta(1, dtype=torch.int64))
        grad_y, grad_x = meta(tokens, N, dtype=BF16), meta(tokens, K, dtype=BF16)
        yield Case(
            f"backward-M{tokens}-{'nested' if double_quant else 'absmax'}",
            backward_launch(grad_y, weight, down, grad_x, config),
            config.tile_n * config.tile_k,
            {80: 11.5, 90: 8.2, 100: 8.2},
            (2 if double_quant else 1) + (double_quant and config.num_warps == 8),
            tensor_cores=True,
            overlaps=True,
            permutes=16 if facts.capability >= 90 else None,
        )


def low_rank_cases() -> Iterator[Case]:
    """The adapter's products, whose large operand is x or grad_y, at 2 bytes an element."""
    seed = meta(1, dtype=torch.int64)
    for tokens, suffix in ((16, "-M16"), (8192, "")):
        x, xa = meta(tokens, K, dtype=BF16), meta(tokens, R, dtype=BF16)
        for dropout_p in (0.0, 0.1):
            drops = "-dropout" if dropout_p else ""
            replay = seed if dropout_p else None
            launch = down_launches(x, meta(R, K), dropout_p, replay, xa)[0]
            elements = launch.arguments["TILE_M"] * launch.arguments["TILE_K"]
            budget = (34.0 if dropout_p else 4.0) + (6.0 if tokens == 16 else 0.0)
            name = f"down{suffix}{drops}"
            # With dropout x is loaded in fours, one Philox counter each.
            narrow = None if dropout_p else 0
            yield Case(name, launch, elements, everywhere(budget), narrow, tensor_cores=True)
            if tokens == 16:
                continue
            launch = down_gradient_launches(x, xa, dropout_p, replay, meta(R, K))[0]
            elements = launch.arguments["TILE_M"] * launch.arguments["TILE_K"]
            budget = 36.0 if dropout_p else 7.0
            name = f"down-gradient{drops}"
            yield Case(name, launch, elements, everywhere(budget), narrow, tensor_cores=True)
    # Three adapters at once, with x copied for one GEMM over K + R.
    x, together = meta(8192, K, dtype=BF16), 3 * R
    xa = meta(8192, together, dtype=BF16)
    extended = meta(8192, K + 64, dtype=BF16)
    launch = down_launches(x, meta(together, K), 0.0, None, xa, extended=extended)[0]
    elements = launch.arguments["TILE_M"] * launch.arguments["TILE_K"]
    yield Case("down-group", launch, elements, everywhere(8.0), tensor_cores=True)
    launch = down_gradient_launches(x, xa, 0.0, None, meta(together, K))[0]
    elements = launch.arguments["TILE_M"] * launch.arguments["TILE_K"]
    yield Case("down-gradient-group", launch, elements, everywhere(9.0), tensor_cores=True)
    xa = meta(8192, R, dtype=BF16)
    grad_y = meta(8192, N, dtype=BF16)
    launch = up_gradient_launches(grad_y, xa, meta(N, R), 1.0, xa, meta(N, R))[0]
    elements = launch.arguments["TILE_M"] * launch.arguments["TILE_N"]
    yield Case("up-gradients", launch, elements, everywhere(6.5), tensor_cores=True)
    launch = reduce_launch(meta(4, 8192, R), xa)
    # The hot loop adds one partial.
    yield Case("reduce", launch, 1024, everywhere(12.0))


def launches_of_one() -> list[Launch]:
    """Launches whose sizes are 1 wherever they can be: Triton makes constants of such arguments,
    which are then no tensors in the kernel."""
    seed, one = meta(1, dtype=torch.int64), meta(1, 1, dtype=BF16)
    byte = meta(1, dtype=torch.uint8)
    weight, column = meta_weight(1, 1, 32), meta_weight(2, 1, 32)
    thin = meta_weight(1, 32, 32)
    x = meta(1, 32, dtype=BF16)
    up, down = Up(one, one, 1.0), Down(meta(1, 32), one, 0.5, seed)
    sizes = MatmulSizes(1, 1, 32, BF16, 32)
    config = forward_config(sizes, H200)
    return [
        quantize_launch(one, meta(1), meta(2, dtype=torch.uint8), 0, 32, None, byte, meta(1)),
        *double_quantize_launches(meta(1), meta(256), 256, byte, meta(1), meta(1)),
        dequantize_launch(weight, one),
        dequantize_launch(column, meta(2, 2, dtype=BF16)[:, :1]),
        dequantize_many_launch([(weight, one), (weight, one)]),
        dropout_launch(one, 0.5, seed, one),
        one_token_launch(x, thin, meta(1), up, one),
        *forward_launches(x, thin, meta(1), up, one, config),
        *few_tokens_launches(x, thin, meta(1), up, one, few_tokens_config(sizes, H200)),
        backward_launch(one, thin, down, x, config),
        *down_launches(one, one, 0.5, seed, one),
        *up_gradient_launches(one, one, one, 1.0, one, one),
        *down_gradient_launches(one, one, 0.5, seed, one),
    ]
