"""dequantize: double-quantized nf4, block size 64, to bf16."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch

import qlora_kernels as qlk
from bench.records import Row, Settings
from bench.shapes import BLOCK_SIZE, DTYPE, FORMAT, WEIGHT, dense_outputs, quantized_weights
from qlora_kernels.backends.cpu.common import machine_isa
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.timing import Rotation, release_free_memory, time_interleaved

WORK = "dequantize 4096x4096 nf4 to bf16"
PAGE_ELEMENTS = 4096 // DTYPE.itemsize


def case_dequantize(settings: Settings) -> list[Row]:
    """Against the bare memory traffic, against page faults, and bitsandbytes."""
    weights, outputs = quantized_weights(), dense_outputs()
    with qlk.backend("reference"):
        expected = qlk.dequantize(weights[0], dtype=DTYPE)
    assert_bitwise_equal(qlk.dequantize(weights[0], dtype=DTYPE), expected)
    assert_bitwise_equal(qlk.dequantize(weights[0], dtype=DTYPE, out=outputs[0]), expected)
    limits = {"rounds": settings.rounds, "seconds": settings.seconds}
    return [
        _into_buffer(weights, outputs, limits),
        _into_fresh(weights, outputs, limits),
        _against_bitsandbytes(weights, limits),
    ]


def _into_buffer(weights: Rotation, outputs: Rotation, limits: dict) -> Row:
    """The peer reads as many bytes and writes as many, both at full vector width."""
    isa, line = machine_isa(), 64
    read, written = weights[0].nbytes // line * line, outputs[0].nbytes
    sources = Rotation(lambda i: torch.full((read,), i, dtype=torch.uint8), read)
    stream = torch.ops.qlora_kernels_cpu.stream_bytes.default
    times = time_interleaved(
        {
            "ours": lambda i: qlk.dequantize(weights[i], dtype=DTYPE, out=outputs[i]),
            "peer": lambda i: stream(sources[i], outputs[i].view(-1).view(torch.uint8), isa),
        },
        **limits,
    )
    speed = f"{(read + written) / times['ours'].median / 1e9:.1f} GB/s"
    return Row(
        f"{WORK}, into a given buffer",
        "loop with the same reads and writes",
        times["ours"],
        times["peer"],
        at_most=1.25,
        note=speed,
    )


def _into_fresh(weights: Rotation, outputs: Rotation, limits: dict) -> Row:
    """The peer allocates a tensor of that size, writes to each of its pages, and dequantizes."""

    def touch_and_dequantize(i: int) -> None:
        fresh = torch.empty(WEIGHT, dtype=DTYPE)
        fresh.view(-1)[::PAGE_ELEMENTS].zero_()
        qlk.dequantize(weights[i], dtype=DTYPE, out=outputs[i])

    times = time_interleaved(
        {
            "ours": lambda i: qlk.dequantize(weights[i], dtype=DTYPE),
            "peer": touch_and_dequantize,
        },
        before=release_free_memory,
        **limits,
    )
    return Row(
        f"{WORK}, into a fresh tensor",
        "touching a fresh tensor + into a given buffer",
        times["ours"],
        times["peer"],
        at_most=1.1,
    )


def _against_bitsandbytes(weights: Rotation, limits: dict) -> Row:
    def theirs(i: int) -> tuple[torch.Tensor, bnb.QuantState]:
        dense = qlk.dequantize(weights[i], dtype=DTYPE)
        return bnb.quantize_4bit(
            dense, blocksize=BLOCK_SIZE, quant_type=FORMAT, compress_statistics=True
        )

    quantized = Rotation(theirs, weights[0].nbytes)
    times = time_interleaved(
        {
            "ours": lambda i: qlk.dequantize(weights[i], dtype=DTYPE),
            "peer": lambda i: bnb.dequantize_4bit(*quantized[i]),
        },
        before=release_free_memory,
        **limits,
    )
    return Row(
        f"{WORK}, into a fresh tensor",
        "bitsandbytes dequantize_4bit",
        times["ours"],
        times["peer"],
    )
