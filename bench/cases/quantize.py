"""quantize: nf4, block size 64, double quantization included."""

from __future__ import annotations

import bitsandbytes.functional as bnb

import qlora_kernels as qlk
from bench.records import Row, Settings
from bench.shapes import BLOCK_SIZE, FORMAT, dense_outputs, dense_weights
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.timing import time_interleaved

WORK = "quantize 4096x4096 bf16 to nf4, double quantization"


def case_quantize(settings: Settings) -> list[Row]:
    """Against a copy of the weight, which reads the same bytes, and bitsandbytes."""
    weights, outputs = dense_weights(), dense_outputs()

    def ours(i: int) -> qlk.QuantizedWeight:
        return qlk.quantize(weights[i], format=FORMAT, block_size=BLOCK_SIZE, double_quant=True)

    with qlk.backend("reference"):
        expected = ours(0).tensors()
    for name, tensor in ours(0).tensors().items():
        assert_bitwise_equal(tensor, expected[name], name)

    limits = {"rounds": settings.rounds, "seconds": settings.seconds}
    copied = time_interleaved(
        {"ours": ours, "peer": lambda i: outputs[i].copy_(weights[i])}, **limits
    )
    theirs = time_interleaved(
        {
            "ours": ours,
            "peer": lambda i: bnb.quantize_4bit(
                weights[i], blocksize=BLOCK_SIZE, quant_type=FORMAT, compress_statistics=True
            ),
        },
        **limits,
    )
    read = weights[0].nbytes
    speed = f"{read / copied['ours'].median / 1e9:.1f} GB/s of weight"
    return [
        Row(
            WORK, "torch copy of the weight", copied["ours"], copied["peer"], at_most=4, note=speed
        ),
        Row(WORK, "bitsandbytes quantize_4bit", theirs["ours"], theirs["peer"], times_faster=30),
    ]
