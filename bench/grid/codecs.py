"""Cases of quantize, double_quantize, dequantize, dequantize_many and dropout: exact, and bound by
memory. Bytes are what must be read and written once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

import qlora_kernels as qlk
from bench.grid import peers
from bench.grid.case import Case, Peer
from bench.grid.points import MANY, Point, storage
from qlora_kernels.reference import dequantize_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.timing import Call


class Quantize(Case):
    """Dense [N, K] to codes and scales, double quantization included where the format has it."""

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        dense = self.dense_weight()
        self.weights = self.rotate(dense, dense.nbytes)
        # Read the weight, write codes and scales.
        self.nbytes = dense.nbytes + qlk.quantize(dense, format=storage(point.format)).nbytes

    def call(self, i: int) -> object:
        return qlk.quantize(self.weights[i], format=storage(self.point.format), check_finite=False)

    def verify(self) -> None:
        mine = qlk.quantize(self.weights[0], format=storage(self.point.format))
        with qlk.backend("reference"):
            theirs = qlk.quantize(self.weights[0], format=storage(self.point.format))
        for name, tensor in theirs.tensors().items():
            assert_bitwise_equal(mine.tensors()[name], tensor, name)

    def peers(self) -> Mapping[str, Peer]:
        outputs = [torch.empty_like(self.weights[0]) for _ in range(2)]
        fmt = storage(self.point.format)
        return {
            "torch copy": lambda: lambda i: outputs[i % 2].copy_(self.weights[i]),
            "bitsandbytes quantize_4bit": lambda: peers.bnb_quantize(fmt, self.weights),
            "torchao to_nf4": lambda: peers.torchao_quantize(fmt, self.weights),
        }


class DoubleQuantize(Case):
    """The fp32 scales of an [N, K] weight at block size 64 to 8 bits."""

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        fmt = storage("-")
        count = math.ceil(point.N * point.K / fmt.block_size)
        scales = self.normal(count, scale=0.003) + 0.05
        self.scales = self.rotate(scales, scales.nbytes)
        # Read the scales once, write a code each, a second-level scale each 256, the offset.
        self.nbytes = 4 * count + count + 4 * math.ceil(count / fmt.scale_block_size) + 4

    def call(self, i: int) -> object:
        return qlk.double_quantize(self.scales[i])

    def verify(self) -> None:
        mine = qlk.double_quantize(self.scales[0])
        with qlk.backend("reference"):
            theirs = qlk.double_quantize(self.scales[0])
        for got, wanted in zip(mine, theirs, strict=True):
            assert_bitwise_equal(got, wanted)

    def peers(self) -> Mapping[str, Peer]:
        return {
            "bitsandbytes quantize_blockwise": lambda: peers.bnb_double_quantize(self.scales),
        }


class Dequantize(Case):
    """Codes and scales to a dense [N, K], written into a given buffer."""

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        qw = self.quantized_weight()
        self.weights = self.rotate(qw, qw.nbytes)
        dense = torch.zeros(point.N, point.K, dtype=point.torch_dtype, device=device)
        self.outputs = self.rotate(dense, dense.nbytes)
        # Read codes and scales, write the weight.
        self.nbytes = qw.nbytes + dense.nbytes

    def call(self, i: int) -> object:
        return qlk.dequantize(self.weights[i], self.point.torch_dtype, out=self.outputs[i])

    def verify(self) -> None:
        mine = qlk.dequantize(self.weights[0], self.point.torch_dtype)
        with qlk.backend("reference"):
            theirs = qlk.dequantize(self.weights[0], self.point.torch_dtype)
        assert_bitwise_equal(mine, theirs)

    def peers(self) -> Mapping[str, Peer]:
        point, dense = self.point, self.dense_weight()
        fmt = storage(point.format)
        operands = [weight.operands() for weight in self.weights.items]
        return {
            "torch copy": lambda: self._copy,
            "bitsandbytes dequantize_4bit": lambda: peers.bnb_dequantize(fmt, dense, self),
            "torchao NF4Tensor": lambda: peers.torchao_dequantize(fmt, dense, self),
            "torch.compile of the reference": lambda: peers.compiled(
                dequantize_reference,
                lambda i: (operands[i % len(operands)], (point.N, point.K), point.torch_dtype),
            ),
        }

    def _copy(self, i: int) -> object:
        return self.outputs[i].copy_(self.outputs[i + 1])


class DequantizeMany(Case):
    """As many weights of [N, K] as q, k and v are, into given buffers."""

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        group = [self.quantized_weight() for _ in range(MANY)]
        nbytes = sum(qw.nbytes for qw in group)
        self.groups = self.rotate(group, nbytes)
        dense = torch.zeros(MANY, point.N, point.K, dtype=point.torch_dtype, device=device)
        self.outputs = self.rotate(dense, dense.nbytes)
        self.nbytes = nbytes + dense.nbytes

    def call(self, i: int) -> object:
        outs = list(self.outputs[i])
        return qlk.dequantize_many(self.groups[i], self.point.torch_dtype, outs)

    def verify(self) -> None:
        dtype = self.point.torch_dtype
        mine = qlk.dequantize_many(self.groups[0], dtype, list(self.outputs[0]))
        with qlk.backend("reference"):
            for got, weight in zip(mine, self.groups[0], strict=True):
                assert_bitwise_equal(got, qlk.dequantize(weight, dtype))

    def peers(self) -> Mapping[str, Peer]:
        return {"ours, one by one": lambda: self._one_by_one}

    def _one_by_one(self, i: int) -> object:
        outs = self.outputs[i]
        return [
            qlk.dequantize(weight, self.point.torch_dtype, out=out)
            for weight, out in zip(self.groups[i], outs, strict=True)
        ]


class Dropout(Case):
    """x [M, K] masked by a seed."""

    probability = 0.1

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        x = self.normal(point.M, point.K)
        self.inputs = self.rotate(x, x.nbytes)
        self.seed = torch.tensor([1234567], dtype=torch.int64, device=device)
        # Read x, write as much.
        self.nbytes = 2 * x.nbytes

    def call(self, i: int) -> object:
        return torch.ops.qlora_kernels.dropout(self.inputs[i], self.probability, self.seed)

    def verify(self) -> None:
        mine = self.call(0)
        with qlk.backend("reference"):
            theirs = self.call(0)
        assert isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor)
        assert_bitwise_equal(mine, theirs)

    def peers(self) -> Mapping[str, Peer]:
        def make() -> Call:
            return lambda i: F.dropout(self.inputs[i], self.probability)

        return {"torch dropout": make}
