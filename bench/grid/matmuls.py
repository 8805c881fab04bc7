"""Cases of the matmuls and of a whole LoRA layer, forward and backward.

Bytes: the weight's codes and scales, x, y and their gradients, the adapter, each once. FLOPs: two
for each multiply-add, so 2MNK for the base's product and 2MR(N + K) for the adapter's two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

import qlora_kernels as qlk
from bench.grid import peers
from bench.grid.case import Case, Peer
from bench.grid.points import Point, storage
from qlora_kernels.reference import quantized_matmul_reference
from qlora_kernels.testing.errors import assert_as_accurate
from qlora_kernels.testing.timing import Call, Rotation

ALL = [True, True, True]
# Rows of a result that are compared with fp64: the first and the last ones, around ragged tiles.
CHECKED_ROWS = 32


def checked(result: torch.Tensor) -> torch.Tensor:
    """The rows of a result, or of an operand, that are compared."""
    if len(result) <= 2 * CHECKED_ROWS:
        return result
    return torch.cat((result[:CHECKED_ROWS], result[-CHECKED_ROWS:]))


class Matmul(Case):
    """y = x Ŵᵀ."""

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        self.dense = self.dense_weight()
        qw = qlk.quantize(self.dense, format=storage(point.format))
        self.weights = self.rotate(qw, qw.nbytes)
        self.operands = [weight.operands() for weight in self.weights.items]
        self.x = self.normal(point.M, point.K, seed=1)
        self.grad_y = self.normal(point.M, point.N, seed=2)
        self.nbytes = qw.nbytes + (point.M * point.K + point.M * point.N) * self.itemsize
        self.flops = 2 * point.M * point.N * point.K

    def weight(self, i: int) -> tuple:
        """Operands of number i."""
        return tuple(self.operands[i % len(self.operands)])

    def exact(self) -> torch.Tensor:
        """Ŵ in fp64."""
        return qlk.dequantize(self.weights[0], torch.float32).double()

    def rounded(self) -> torch.Tensor:
        """Ŵ as a dense layer holds it."""
        return qlk.dequantize(self.weights[0], self.point.torch_dtype)

    def call(self, i: int) -> object:
        return qlk.quantized_linear(self.x, self.weights[i])

    def verify(self) -> None:
        x = checked(self.x)
        y = checked(qlk.quantized_linear(self.x, self.weights[0]))
        assert_as_accurate(y, x.double() @ self.exact().T, F.linear(x, self.rounded()))

    def dense_copies(self) -> Rotation[torch.Tensor]:
        """The dense weight, rotated."""
        return self.rotate(self.dense, self.dense.nbytes)

    def peers(self) -> Mapping[str, Peer]:
        fmt, dense, x = storage(self.point.format), self.dense, self.x

        def dense_linear() -> Call:
            weights = self.dense_copies()
            return lambda i: F.linear(x, weights[i])

        return {
            f"torch {self.point.dtype} linear": dense_linear,
            "bitsandbytes dequantize + linear": lambda: peers.bnb_two_steps(fmt, dense, self, x),
            "bitsandbytes Linear4bit, train": lambda: peers.bnb_linear(fmt, dense, self, x, True),
            "bitsandbytes Linear4bit, eval": lambda: peers.bnb_linear(fmt, dense, self, x, False),
            "torchao linear_nf4": lambda: peers.torchao_linear(fmt, dense, self, x),
            "torch.compile of the reference": lambda: peers.compiled(
                quantized_matmul_reference,
                lambda i: (x, self.operands[i % len(self.operands)]),
            ),
        }


class MatmulBackwardInput(Matmul):
    """grad_x = grad_y Ŵ."""

    def call(self, i: int) -> object:
        op = torch.ops.qlora_kernels.quantized_matmul_backward_input
        return op(self.grad_y, *self.weight(i))

    def verify(self) -> None:
        grad_y, grad_x = checked(self.grad_y), self.call(0)
        assert isinstance(grad_x, torch.Tensor)
        exact = grad_y.double() @ self.exact()
        assert_as_accurate(checked(grad_x), exact, grad_y @ self.rounded())

    def peers(self) -> Mapping[str, Peer]:
        fmt, dense, grad_y = storage(self.point.format), self.dense, self.grad_y

        def dense_matmul() -> Call:
            weights = self.dense_copies()
            return lambda i: grad_y @ weights[i]

        return {
            f"torch {self.point.dtype} matmul": dense_matmul,
            "bitsandbytes dequantize + matmul": lambda: peers.bnb_backward_input(
                fmt, dense, self, grad_y
            ),
        }


class QLoRA(Matmul):
    """y = x Ŵᵀ + scaling (x Aᵀ) Bᵀ with fp32 adapters."""

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        self.scaling = peers.ALPHA / point.R
        self.lora_a = self.normal(point.R, point.K, scale=point.K**-0.5, seed=3).float()
        self.lora_b = self.normal(point.N, point.R, scale=0.02, seed=4).float()
        self.nbytes += 4 * point.R * (point.N + point.K)
        self.flops += 2 * point.M * point.R * (point.N + point.K)

    def call(self, i: int) -> object:
        return qlk.qlora_linear(self.x, self.weights[i], self.lora_a, self.lora_b, self.scaling)

    def verify(self) -> None:
        x, dtype = checked(self.x), self.point.torch_dtype
        y = qlk.qlora_linear(self.x, self.weights[0], self.lora_a, self.lora_b, self.scaling)
        x64, a64, b64 = x.double(), self.lora_a.double(), self.lora_b.double()
        exact = x64 @ self.exact().T + self.scaling * (x64 @ a64.T) @ b64.T
        plain = F.linear(F.linear(x, self.lora_a.to(dtype)), self.lora_b.to(dtype))
        assert_as_accurate(checked(y), exact, F.linear(x, self.rounded()) + self.scaling * plain)

    def layers(self) -> Mapping[str, Callable[[], Rotation[nn.Module]]]:
        """PEFT's layers over the same weight, and ours over the dense one, rotated."""
        fmt, dense, rank = storage(self.point.format), self.dense, self.point.R

        def bitsandbytes(fused: bool) -> Rotation[nn.Module]:
            model = peers.peft_layer(peers.bnb_layer(fmt, dense), rank)
            if fused:
                qlk.accelerate(model, verbose=False)
            return self.rotate(model.train(), dense.numel() // 2)

        def unfused() -> Rotation[nn.Module]:
            base = peers.dense_linear(dense)
            layer = peers.UnfusedLoRA(base, *dense.shape, rank, peers.ALPHA)
            return self.rotate(layer, dense.nbytes)

        return {
            f"PEFT over {self.point.dtype}": lambda: self.rotate(
                peers.peft_layer(peers.dense_linear(dense), rank), dense.nbytes
            ),
            f"PEFT's formula over {self.point.dtype}": unfused,
            "PEFT over bitsandbytes": lambda: bitsandbytes(False),
            "PEFT over bitsandbytes, accelerated": lambda: bitsandbytes(True),
            f"our LoRALinear over {self.point.dtype}": lambda: self.rotate(
                qlk.LoRALinear(dense, rank=rank, alpha=peers.ALPHA), dense.nbytes
            ),
        }

    def peers(self) -> Mapping[str, Peer]:
        def without_adapter() -> Call:
            return lambda i: qlk.quantized_linear(self.x, self.weights[i])

        def dense_linear() -> Call:
            weights = self.dense_copies()
            return lambda i: F.linear(self.x, weights[i])

        def forward(make: Callable[[], Rotation[nn.Module]]) -> Peer:
            def made() -> Call:
                layers = make()
                return lambda i: layers[i](self.x)

            return made

        return {
            "ours without the adapter": without_adapter,
            f"torch {self.point.dtype} linear without adapter": dense_linear,
            **{name: forward(make) for name, make in self.layers().items()},
        }


class QLoRABackward(QLoRA):
    """grad_x, grad_A and grad_B."""

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        # grad_x beside x and grad_y; the adapter's gradients; xa. Four thin products, not two.
        self.nbytes += point.M * (point.K + point.R) * self.itemsize
        self.nbytes += 4 * point.R * (point.N + point.K)
        self.flops += 2 * point.M * point.R * (point.N + point.K)
        self.xa = F.linear(self.x, self.lora_a.to(point.torch_dtype))

    def call(self, i: int) -> object:
        rest = (self.lora_a, self.lora_b, self.scaling, 0.0, None, ALL)
        op = torch.ops.qlora_kernels.qlora_linear_backward
        return op(self.grad_y, self.x, self.xa, *self.weight(i), *rest)

    def verify(self) -> None:
        self.compare(*self.call(0))  # type: ignore[misc]

    def compare(self, grad_x: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor) -> None:
        """Raises AssertionError where a gradient is off by more than twice torch's own error."""
        dtype, g, x, s = self.point.torch_dtype, self.grad_y, self.x.detach(), self.scaling
        g64, x64, a64, b64 = g.double(), x.double(), self.lora_a.double(), self.lora_b.double()
        a, b = self.lora_a.to(dtype), self.lora_b.to(dtype)
        u64, u = s * (g64 @ b64), s * (g @ b)
        exact = checked(g64) @ self.exact() + checked(u64) @ a64
        plain = checked(g) @ self.rounded() + checked(u) @ a
        assert_as_accurate(checked(grad_x), exact, plain)
        assert_as_accurate(grad_a, u64.T @ x64, (u.T @ x).float())
        plain_b = (s * (g.T @ self.xa)).float()
        assert_as_accurate(grad_b, s * g64.T @ (x64 @ a64.T), plain_b)

    def peers(self) -> Mapping[str, Peer]:
        dtype = self.point.torch_dtype
        a, b = self.lora_a.to(dtype), self.lora_b.to(dtype)

        def products() -> Call:
            weights, g, x, s = self.dense_copies(), self.grad_y, self.x, self.scaling

            def call(i: int) -> object:
                u = s * (g @ b)
                return torch.addmm(u @ a, g, weights[i]), u.T @ x, s * (g.T @ self.xa)

            return call

        return {f"torch {self.point.dtype} products": products}


class LoRALayer(QLoRABackward):
    """A layer's forward and backward through autograd."""

    with_grad = True

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        layer = qlk.QLoRALinear.from_quantized(self.weights[0], rank=point.R, alpha=peers.ALPHA)
        layer.lora_b.data.copy_(self.lora_b)
        layer.lora_a.data.copy_(self.lora_a)
        self.modules = self.rotate(layer, self.weights[0].nbytes)
        # The forward's cost beside the backward's: codes, x, y, adapter.
        self.nbytes += self.weights[0].nbytes + point.M * (point.N + point.K) * self.itemsize
        self.nbytes += 4 * point.R * (point.N + point.K)
        self.flops += 2 * point.M * (point.N * point.K + point.R * (point.N + point.K))
        self.x.requires_grad_()

    def call(self, i: int) -> object:
        return self.step(self.modules[i])

    def step(self, layer: nn.Module) -> None:
        """Forward and backward; gradients are fresh tensors, as after `zero_grad`."""
        self.x.grad = None
        layer.zero_grad(set_to_none=True)
        y: torch.Tensor = layer(self.x)
        y.backward(self.grad_y)

    def verify(self) -> None:
        layer = self.modules[0]
        self.step(layer)
        gradients = (self.x.grad, layer.lora_a.grad, layer.lora_b.grad)
        assert all(gradient is not None for gradient in gradients)
        self.compare(*gradients)  # type: ignore[arg-type]

    def peers(self) -> Mapping[str, Peer]:
        def training(make: Callable[[], Rotation[nn.Module]]) -> Peer:
            def made() -> Call:
                layers = make()
                return lambda i: self.step(layers[i])

            return made

        return {name: training(make) for name, make in self.layers().items()}
