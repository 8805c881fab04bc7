"""What each wrapped or emulated CUDA instruction must do, worked out from the PTX manual's
definition in plain torch; run on the emulation and, with `-m gpu`, on hardware."""

from __future__ import annotations

import torch

from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.emulation.cuda.runner import Runner

LANES = 32


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random 32-bit words as int32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).int()


def check_permute_bytes(runner: Runner, seed: int) -> None:
    operands = words(LANES, 3, seed=seed)
    got = runner.call(
        "permute_bytes",
        seed=seed,
        inputs={"operands": operands},
        outputs={"result": torch.empty(LANES, dtype=torch.int32)},
    )["result"]
    for lane in range(LANES):
        low, high, selector = (int(v) & 0xFFFFFFFF for v in operands[lane])
        source = [(low | high << 32) >> 8 * i & 0xFF for i in range(8)]
        expected = 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            expected |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << 8 * i
        assert int(got[lane]) & 0xFFFFFFFF == expected


def check_conversions(runner: Runner, seed: int) -> None:
    # Every fp16, and as fp32 what rounds to each bf16 and fp16 neighbourhood: exact values, ties,
    # and their fp32 neighbours.
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    exact = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    bits = exact.view(torch.int32)
    pieces = [bits, bits + 0x8000, bits + 0x7FFF, bits + 0x8001, bits + 0x1000, bits + 0x0FFF]
    values = torch.cat([*pieces, words(2**17, seed=seed)]).view(torch.float32).reshape(-1, 2)
    count = len(values)
    halves = halves.repeat(-(-count // 2**16))[:count]
    pairs = torch.empty(count, 2, dtype=torch.int16)
    got = runner.call(
        "convert",
        seed=seed,
        integers={"count": count},
        inputs={"pairs": values, "halves": halves},
        outputs={
            "bf16": pairs.view(torch.bfloat16),
            "f16": pairs.view(torch.float16),
            "widened": torch.empty(count),
        },
    )
    assert_bitwise_equal(got["bf16"], values.to(torch.bfloat16), "bf16")
    assert_bitwise_equal(got["f16"], values.to(torch.float16), "f16")
    assert_bitwise_equal(got["widened"], halves.view(torch.float16).float(), "widened")


def _fragments(matrix: torch.Tensor, rows: str) -> torch.Tensor:
    """The registers [32, n] of a 16 x 16 left ("row") or 16 x 8 right ("column") operand.

    PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": a_i is in row g for
    0 <= i < 2 or 4 <= i < 6, else g + 8, in column 2t + (i & 1), + 8 for i >= 4; b_i is in row
    2t + (i & 1), + 8 for i >= 2, column g; g = lane >> 2, t = lane % 4.
    """
    n = 8 if rows == "row" else 4
    lanes = torch.empty(LANES, n, dtype=matrix.dtype)
    for lane in range(LANES):
        g, t = lane >> 2, lane % 4
        for i in range(n):
            if rows == "row":
                row = g if i < 2 or 4 <= i < 6 else g + 8
                lanes[lane, i] = matrix[row, 2 * t + (i & 1) + (8 if i >= 4 else 0)]
            else:
                lanes[lane, i] = matrix[2 * t + (i & 1) + (8 if i >= 2 else 0), g]
    return lanes


def check_multiply_add(runner: Runner, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(16, 16, generator=generator).to(dtype)
    right = torch.randn(16, 8, generator=generator).to(dtype)
    before = torch.randn(16, 8, generator=generator)
    # c_i: row g for i < 2 else g + 8, column 2t + (i & 1).
    place = [
        [(lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2) for i in range(4)]
        for lane in range(LANES)
    ]
    sums = torch.tensor([[before[at] for at in lane] for lane in place])
    got = runner.call(
        "multiply_add",
        seed=seed,
        integers={"bfloat16": dtype == torch.bfloat16},
        inputs={"left": _fragments(left, "row"), "right": _fragments(right, "column")},
        changed={"sum": sums},
    )["sum"]
    after = torch.empty(16, 8)
    for lane in range(LANES):
        for i in range(4):
            after[place[lane][i]] = got[lane, i]
    exact = before.double() + left.double() @ right.double()
    magnitude = before.double().abs() + left.double().abs() @ right.double().abs()
    # Products are exact; the manual leaves the order and the rounding of the sum open.
    assert ((after.double() - exact).abs() <= 16 * 2.0**-23 * magnitude).all()


def check_load_matrices(runner: Runner, seed: int, transpose: bool) -> None:
    matrices = words(4, 8, 4, seed=seed).view(torch.int16).reshape(4, 8, 8)
    got = runner.call(
        "load_matrices",
        seed=seed,
        integers={"transpose": transpose},
        inputs={"rows": matrices},
        outputs={"result": torch.empty(LANES, 4, 2, dtype=torch.int16)},
    )["result"]
    for lane in range(LANES):
        for j in range(4):
            matrix = matrices[j].t() if transpose else matrices[j]
            row, column = lane // 4, 2 * (lane % 4)
            assert got[lane, j].tolist() == matrix[row, column : column + 2].tolist()


def check_copy_async(runner: Runner, seed: int) -> None:
    source = words(LANES, 8, seed=seed)
    for present in (16, 12, 4, 0):
        got = runner.call(
            "copy_async",
            seed=seed,
            integers={"present": present},
            inputs={"source": source},
            outputs={"result": torch.empty(LANES, 7, dtype=torch.int32)},
        )["result"]
        expected = source[:, :7].clone()
        expected[:, present // 4 : 4] = 0
        assert_bitwise_equal(got, expected, f"{present} bytes")


def check_shuffles(runner: Runner, seed: int) -> None:
    values = words(LANES, seed=seed)
    for width in (32, 16, 8):
        for argument in (0, 1, 5, 9, 31):
            got = runner.call(
                "shuffle",
                seed=seed,
                integers={"argument": argument, "width": width},
                inputs={"values": values},
                outputs={"result": torch.empty(6, LANES, dtype=torch.int32)},
            )["result"]
            for lane in range(LANES):
                segment = lane // width * width
                by_index = segment + argument % width
                by_xor = lane ^ argument
                by_down = lane + argument
                # Out of the segment's end (xor may reach back before it): the lane's own value.
                by_xor = by_xor if by_xor < segment + width else lane
                by_down = by_down if by_down < segment + width else lane
                assert got[0, lane] == values[by_index]
                assert got[1, lane] == values[by_xor]
                assert got[2, lane] == values[by_down]
                ballot = sum(1 << i for i in range(LANES) if int(values[i]) & 1)
                assert int(got[3, lane]) & 0xFFFFFFFF == ballot
                assert bool(got[4, lane]) == any(int(v) & 2 for v in values)
                assert bool(got[5, lane]) == all(int(v) & 4 for v in values)
    every = torch.full((LANES,), 4, dtype=torch.int32)
    got = runner.call(
        "shuffle",
        integers={"argument": 0, "width": 32},
        inputs={"values": every},
        outputs={"result": torch.empty(6, LANES, dtype=torch.int32)},
    )["result"]
    assert got[5].bool().all()
    assert not got[4].any()


CHECKS = {
    "prmt": check_permute_bytes,
    "cvt": check_conversions,
    "mma_bf16": lambda runner, seed: check_multiply_add(runner, seed, torch.bfloat16),
    "mma_f16": lambda runner, seed: check_multiply_add(runner, seed, torch.float16),
    "ldmatrix": lambda runner, seed: check_load_matrices(runner, seed, False),
    "ldmatrix_trans": lambda runner, seed: check_load_matrices(runner, seed, True),
    "cp_async": check_copy_async,
    "shuffles_and_votes": check_shuffles,
}
