"""quantized_matmul: x [M, 4096] times a double-quantized nf4 weight, forward and with grad_x."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import torch
import torch.nn.functional as F

import qlora_kernels as qlk
from bench.records import Row, Settings
from bench.shapes import BLOCK_SIZE, DTYPE, FORMAT, WEIGHT, dense_weights, quantized_weights
from qlora_kernels.backends.cpu.common import machine_isa
from qlora_kernels.testing.errors import assert_as_accurate
from qlora_kernels.testing.timing import Rotation, Timing, time_interleaved

Call = Callable[[int], object]
LINE = 64
# What a measurement of the read rate writes: a line per task of stream_bytes.
WRITTEN = 256 * LINE


def case_quantized_matmul(settings: Settings) -> list[Row]:
    """Against torch's dense linear, bitsandbytes' 4-bit linear and the rate of reading."""
    problem = Problem(settings)
    problem.verify()
    rows = problem.forward(1, faster_than_torch=3, faster_than_train=8, faster_than_eval=1.2)
    rows.append(problem.read_rate())
    rows += problem.forward(16, faster_than_torch=1.5, faster_than_eval=1.2)
    rows += problem.forward(512, torch_at_most=1.06, faster_than_train=1.3)
    rows += problem.training(512, torch_at_most=1.08, faster_than_train=1.4)
    rows.append(problem.forward_fp32(512, at_most=1.1))
    rows.append(problem.batch_invariant(512))
    return rows


class Problem:
    """The operands of every row: the same weights, dense, ours and bitsandbytes', rotated."""

    def __init__(self, settings: Settings) -> None:
        self.limits = {"rounds": settings.rounds, "seconds": settings.seconds}
        self.ours = quantized_weights()
        self.dense = dense_weights()
        nbytes = self.ours[0].nbytes
        self.train = Rotation(lambda i: bnb_layer(self.ours[i]).train(), nbytes)
        self.eval = Rotation(lambda i: bnb_layer(self.ours[i]).eval(), nbytes)

    def verify(self) -> None:
        """No time is taken of a wrong result."""
        for tokens in (1, 16, 512):
            x, qw = inputs(tokens), self.ours[0]
            w = qlk.dequantize(qw, torch.float32)
            y, exact = qlk.quantized_linear(x, qw), x.double() @ w.double().t()
            assert_as_accurate(y, exact, F.linear(x, w.to(DTYPE)))
            assert_as_accurate(y, exact, self.train[0](x).detach())

    def row(
        self,
        work: str,
        peer: str,
        calls: dict[str, Call],
        *,
        at_most: float | None = None,
        times_faster: float | None = None,
        note: Callable[[Timing], str] | None = None,
    ) -> Row:
        """One comparison."""
        with torch.no_grad():
            times = time_interleaved(calls, **self.limits)
        text = note(times["ours"]) if note else ""
        return Row(work, peer, times["ours"], times["peer"], at_most, times_faster, text)

    def forward(
        self,
        tokens: int,
        *,
        torch_at_most: float | None = None,
        faster_than_torch: float | None = None,
        faster_than_train: float | None = None,
        faster_than_eval: float | None = None,
    ) -> list[Row]:
        """Against torch's bf16 linear and the two ways of bitsandbytes."""
        work, x = f"forward M = {tokens}", inputs(tokens)

        def ours(i: int) -> object:
            return qlk.quantized_linear(x, self.ours[i])

        rows = [
            self.row(
                work,
                "torch bf16 F.linear",
                {"ours": ours, "peer": lambda i: F.linear(x, self.dense[i])},
                at_most=torch_at_most,
                times_faster=faster_than_torch,
            ),
            self.row(
                work,
                "bitsandbytes Linear4bit, train mode",
                {"ours": ours, "peer": lambda i: self.train[i](x)},
                times_faster=faster_than_train,
            ),
        ]
        if bnb.functional.has_avx512bf16():
            rows.append(
                self.row(
                    work,
                    "bitsandbytes Linear4bit, eval mode (fused)",
                    {"ours": ours, "peer": lambda i: self.eval[i](x)},
                    times_faster=faster_than_eval,
                )
            )
        return rows

    def read_rate(self) -> Row:
        """M = 1 against reading the same bytes and doing nothing with them."""
        isa, x = machine_isa(), inputs(1)
        read = self.ours[0].nbytes // LINE * LINE
        sources = Rotation(lambda i: torch.full((read,), i, dtype=torch.uint8), read)
        target = torch.zeros(WRITTEN + LINE, dtype=torch.uint8)
        target = target[-target.data_ptr() % LINE :][:WRITTEN]
        stream = torch.ops.qlora_kernels_cpu.stream_bytes.default
        return self.row(
            "forward M = 1",
            "reading the weight's bytes",
            {
                "ours": lambda i: qlk.quantized_linear(x, self.ours[i]),
                "peer": lambda i: stream(sources[i], target, isa),
            },
            at_most=1 / 0.75,
            note=lambda mine: f"{read / mine.median / 1e9:.1f} GB/s",
        )

    def training(self, tokens: int, *, torch_at_most: float, faster_than_train: float) -> list[Row]:
        """Forward and grad_x."""
        x, grad_y = inputs(tokens).requires_grad_(), inputs(tokens, WEIGHT[0])

        def step(layer: Callable[[int], torch.Tensor]) -> Call:
            def run(i: int) -> None:
                x.grad = None
                with torch.enable_grad():
                    layer(i).backward(grad_y)

            return run

        ours = step(lambda i: qlk.quantized_linear(x, self.ours[i]))
        work = f"forward + grad_x M = {tokens}"
        return [
            self.row(
                work,
                "torch bf16 F.linear and its grad_x",
                {"ours": ours, "peer": step(lambda i: F.linear(x, self.dense[i]))},
                at_most=torch_at_most,
            ),
            self.row(
                work,
                "bitsandbytes Linear4bit, train mode",
                {"ours": ours, "peer": step(lambda i: self.train[i](x))},
                times_faster=faster_than_train,
            ),
        ]

    def forward_fp32(self, tokens: int, *, at_most: float) -> Row:
        """fp32 x, which computes in fp32."""
        x = inputs(tokens).float()
        dense = dense_weights(dtype=torch.float32)
        return self.row(
            f"forward M = {tokens}, fp32 x",
            "torch fp32 F.linear",
            {
                "ours": lambda i: qlk.quantized_linear(x, self.ours[i]),
                "peer": lambda i: F.linear(x, dense[i]),
            },
            at_most=at_most,
        )

    def batch_invariant(self, tokens: int) -> Row:
        """What the same bits whatever else is in the batch cost."""
        x = inputs(tokens)
        return self.row(
            f"forward M = {tokens}, batch_invariant",
            "the same without",
            {
                "ours": lambda i: qlk.quantized_linear(x, self.ours[i], batch_invariant=True),
                "peer": lambda i: qlk.quantized_linear(x, self.ours[i]),
            },
        )


def inputs(tokens: int, size: int = WEIGHT[1]) -> torch.Tensor:
    """Activations [tokens, size], standard normal."""
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).to(DTYPE)


def bnb_layer(qw: qlk.QuantizedWeight) -> bnb.nn.Linear4bit:
    """A bitsandbytes layer of about the same weight: quantized from its dense values."""
    rows, cols = qw.shape
    layer = bnb.nn.Linear4bit(
        cols, rows, bias=False, compute_dtype=DTYPE, compress_statistics=True, quant_type=FORMAT
    )
    layer.weight = bnb.nn.Params4bit(
        qlk.dequantize(qw, DTYPE),
        requires_grad=False,
        blocksize=BLOCK_SIZE,
        compress_statistics=True,
        quant_type=FORMAT,
    )
    return layer.to("cpu")
