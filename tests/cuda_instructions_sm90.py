"""What each wrapped instruction of sm_90 must do, worked out from the PTX manual's definition in
plain torch, as in cuda_instructions.py."""

from __future__ import annotations

import torch

from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.cuda_instructions import LANES, words
from tests.emulation.cuda.runner import Runner

WARPGROUP = 128
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 256)


def swizzled(rows: torch.Tensor, swizzle: int) -> torch.Tensor:
    """Rows of bytes [n, width] as they lie in shared memory, [n * width].

    PTX ISA, "Swizzling Modes": in the repeating pattern of 8 rows of the mode's width, 16-byte
    piece p of a row goes to p XOR (row mod 8) of 128 bytes, p XOR (row / 2 mod 4) of 64 and
    p XOR (row / 4 mod 2) of 32.
    """
    if not swizzle:
        return rows.reshape(-1)
    n, pieces = len(rows), swizzle // 16
    taken = rows.reshape(n, pieces, 16)
    placed = torch.empty_like(taken)
    for row in range(n):
        for piece in range(pieces):
            placed[row, piece ^ (row * pieces // 8 % pieces)] = taken[row, piece]
    return placed.reshape(-1)


def check_copy_tensor(runner: Runner, seed: int) -> None:
    cases = (
        # element bytes, matrix, row stride, box, first column and row, swizzle
        (2, (20, 100), 208, (64, 16), (0, 0), 128),
        (2, (20, 100), 208, (64, 16), (64, 8), 128),
        (2, (20, 100), 208, (64, 9), (-8, -3), 128),
        (2, (20, 100), 208, (32, 16), (33, 2), 64),
        (1, (20, 208), 208, (32, 24), (-5, 0), 32),
        (4, (20, 50), 208, (8, 20), (43, -19), 0),
        (1, (20, 200), 208, (256, 3), (0, 18), 0),
        (2, (1, 8), 16, (8, 8), (200, 0), 0),
    )
    for element_bytes, (outer, inner), stride, box, (column, row), swizzle in cases:
        data = words(outer * stride // 4, seed=seed).view(torch.uint8).reshape(outer, stride)
        box_bytes = box[0] * element_bytes
        got = runner.call(
            "copy_tensor",
            seed=seed,
            integers={
                "element_bytes": element_bytes,
                "inner": inner,
                "outer": outer,
                "row_stride_bytes": stride,
                "box_inner": box[0],
                "box_outer": box[1],
                "swizzle": swizzle,
                "column": column,
                "row": row,
            },
            inputs={"data": data},
            outputs={
                "result": torch.empty(box_bytes * box[1], dtype=torch.uint8),
                "in_order": torch.empty(box[1], box_bytes, dtype=torch.uint8),
            },
        )
        expected = torch.zeros(box[1], box_bytes, dtype=torch.uint8)
        for r in range(box[1]):
            for c in range(box[0]):
                if 0 <= row + r < outer and 0 <= column + c < inner:
                    at = (column + c) * element_bytes
                    element = data[row + r, at : at + element_bytes]
                    expected[r, c * element_bytes : (c + 1) * element_bytes] = element
        where = f"box {box} at {column}, {row}"
        assert_bitwise_equal(got["result"], swizzled(expected, swizzle), where)
        assert_bitwise_equal(got["in_order"], expected, where)


def check_copy_bulk(runner: Runner, seed: int) -> None:
    pieces = 5
    source = words(pieces, 48, seed=seed)
    got = runner.call(
        "copy_bulk",
        seed=seed,
        integers={"count": pieces},
        inputs={"source": source},
        outputs={"result": torch.empty_like(source)},
    )["result"]
    assert_bitwise_equal(got, source)


def check_mbarrier(runner: Runner, seed: int) -> None:
    rounds = 7
    source = words(rounds, LANES, seed=seed)
    got = runner.call(
        "mbarrier",
        seed=seed,
        integers={"count": rounds},
        inputs={"source": source},
        outputs={"result": torch.empty(rounds, 2, LANES, dtype=torch.int32)},
    )["result"]
    for consumer in range(2):
        assert_bitwise_equal(got[:, consumer], source.roll(-1 - consumer, 1))


def check_named_barrier(runner: Runner, seed: int) -> None:
    source, rounds = words(64, seed=seed), 3
    got = runner.call(
        "named_barrier",
        seed=seed,
        integers={"count": rounds},
        inputs={"source": source},
        outputs={"result": torch.empty(2, 64, dtype=torch.int32)},
    )["result"]
    for pair in range(2):
        assert_bitwise_equal(got[pair], source.flip(0) + (rounds * (pair + 1) - 1))


def check_elect(runner: Runner, seed: int) -> None:
    outputs = {"result": torch.empty(2, LANES, dtype=torch.int32)}
    got = runner.call("elect", seed=seed, outputs=outputs)["result"]
    ballot = int(got[0, 0]) & 0xFFFFFFFF
    assert ballot.bit_count() == 1
    assert (got == got[0, 0]).all()


def check_register_budget(runner: Runner, seed: int) -> None:
    source = torch.arange(3 * WARPGROUP).float()
    got = runner.call(
        "register_budget",
        seed=seed,
        inputs={"source": source},
        outputs={"result": torch.empty(3 * WARPGROUP)},
    )["result"]
    expected = source.clone()
    for thread in range(WARPGROUP, 3 * WARPGROUP):
        expected[thread] = 2 * sum((thread + i) % (3 * WARPGROUP) for i in range(160))
    assert_bitwise_equal(got, expected)


def left_registers(left: torch.Tensor) -> torch.Tensor:
    """left [64, 16] as the registers [128, 8] of a warpgroup's threads.

    PTX ISA, "Register Fragments" of wgmma.m64nNk16: a_i of warp w is in row 16 w + g for i < 2 and
    4 <= i < 6, else 8 further, in column 2t + (i & 1), + 8 for i >= 4; g = lane >> 2, t = lane % 4.
    """
    registers = torch.empty(WARPGROUP, 8, dtype=left.dtype)
    for thread in range(WARPGROUP):
        warp, lane = thread // 32, thread % 32
        for i in range(8):
            row = 16 * warp + lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8)
            registers[thread, i] = left[row, 2 * (lane % 4) + (i & 1) + (8 if i >= 4 else 0)]
    return registers


def sums_places(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns [128, n / 2] of a warpgroup's accumulators.

    PTX ISA, same section: d_i of warp w is in row 16 w + g for i % 4 < 2, else 8 further, in column
    8 (i / 4) + 2t + (i & 1).
    """
    thread, i = torch.arange(WARPGROUP)[:, None], torch.arange(n // 2)[None]
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i % 4 // 2)
    return rows, 8 * (i // 4) + 2 * (thread % 4) + i % 2


def tile_bytes(right: torch.Tensor, swizzle: int) -> torch.Tensor:
    """right [N, K], K of the swizzle's width, as it lies in shared memory; unswizzled in "core
    matrices" of 8 rows of 16 bytes, first along K, then along N."""
    if swizzle:
        return swizzled(right.contiguous().view(torch.uint8), swizzle)
    n, k = right.shape
    cores = right.reshape(n // 8, 8, k // 8, 8).permute(0, 2, 1, 3)
    return cores.reshape(-1).contiguous().view(torch.uint8)


def check_wgmma(runner: Runner, seed: int, dtype: torch.dtype) -> None:
    modes = {128: 32, 64: 32, 32: 32, 0: 256}
    # A third of the widths, each with 128 bytes, the kernels' swizzle, and with another one.
    for number, n in enumerate(WIDTHS[seed % 3 :: 3]):
        for swizzle in (128, (64, 32, 0)[number % 3]):
            generator = torch.Generator().manual_seed(seed)
            k = swizzle // 2 or 32
            left = torch.randn(64, k, generator=generator).to(dtype)
            right = torch.randn(n, k, generator=generator).to(dtype)
            before = torch.randn(64, n, generator=generator)
            rows, columns = sums_places(n)
            accumulate = (number + swizzle // 32) % 2 == 1
            registers = torch.stack(
                [left_registers(left[:, 16 * s : 16 * s + 16]) for s in range(k // 16)]
            )
            got = runner.call(
                "wgmma",
                seed=seed,
                integers={
                    "n": n,
                    "bfloat16": dtype == torch.bfloat16,
                    "steps": k // 16,
                    "step_bytes": modes[swizzle],
                    "swizzle": swizzle,
                    # Unswizzled: the next 8 rows are behind all columns of these.
                    "stride_bytes": 8 * swizzle or 16 * k,
                    "leading_bytes": 128,
                    "accumulate": accumulate,
                },
                inputs={"left": registers, "tile": tile_bytes(right, swizzle)},
                changed={"sums": before[rows, columns]},
            )["sums"]
            after = torch.empty(64, n)
            after[rows, columns] = got
            start = before.double() if accumulate else torch.zeros(64, n, dtype=torch.float64)
            exact = start + left.double() @ right.double().T
            magnitude = start.abs() + left.double().abs() @ right.double().abs().T
            # Products are exact; the manual leaves the order and the rounding of the sum open.
            assert ((after.double() - exact).abs() <= k * 2.0**-23 * magnitude).all()


def check_overlap(runner: Runner, seed: int) -> None:
    source = words(4, 64, seed=seed).reshape(-1)
    got = runner.call(
        "overlap",
        seed=seed,
        integers={"blocks": 4},
        inputs={"source": source},
        outputs={
            "values": torch.empty_like(source),
            "between": torch.empty_like(source),
            "result": torch.empty_like(source),
        },
    )
    between = (source + 1).flip(0) + source
    assert_bitwise_equal(got["between"], between, "the second launch")
    assert_bitwise_equal(got["result"], between.flip(0) + source, "the third launch")


CHECKS = {
    "cp_async_bulk_tensor": check_copy_tensor,
    "cp_async_bulk": check_copy_bulk,
    "mbarrier": check_mbarrier,
    "bar_sync": check_named_barrier,
    "elect": check_elect,
    "setmaxnreg": check_register_budget,
    "wgmma_bf16": lambda runner, seed: check_wgmma(runner, seed, torch.bfloat16),
    "wgmma_f16": lambda runner, seed: check_wgmma(runner, seed, torch.float16),
    "griddepcontrol": check_overlap,
}
