"""The case of projections that share x, as q, k and v do: forward and backward of all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

import qlora_kernels as qlk
from bench.grid import peers
from bench.grid.case import Peer
from bench.grid.matmuls import LoRALayer, checked
from bench.grid.points import MANY, Point
from qlora_kernels.testing.errors import assert_as_accurate
from qlora_kernels.testing.timing import Call, Rotation


class LoRAGroup(LoRALayer):
    """`MANY` LoRA layers of one x, of equal weights in memory of their own."""

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        super().__init__(point, device, rotated_bytes)
        layers = nn.ModuleList(copy.deepcopy(self.modules[0]) for _ in range(MANY))
        self.lists = self.rotate(layers, MANY * self.weights[0].nbytes)
        self.groups = [qlk.QLoRAGroup(list(layers)) for layers in self.lists.items]
        # As many layers, but x is read, cast and saved once, and its gradient written once.
        extra = 2 * point.M * point.K * self.itemsize
        self.nbytes = MANY * self.nbytes - (MANY - 1) * extra
        self.flops *= MANY

    def call(self, i: int) -> object:
        return self.together(self.groups[i % len(self.groups)], self.lists[i])

    def together(
        self, forward: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], layers: nn.Module
    ) -> None:
        """Forward and backward; gradients are fresh tensors."""
        self.x.grad = None
        layers.zero_grad(set_to_none=True)
        ys = forward(self.x)
        torch.autograd.backward(ys, [self.grad_y] * len(ys))

    def verify(self) -> None:
        self.call(0)
        dtype, g, s = self.point.torch_dtype, checked(self.grad_y), self.scaling
        u64, u = s * (g.double() @ self.lora_b.double()), s * (g @ self.lora_b.to(dtype))
        exact = MANY * (g.double() @ self.exact() + u64 @ self.lora_a.double())
        one = g @ self.rounded() + u @ self.lora_a.to(dtype)
        plain = one
        for _ in range(MANY - 1):
            plain = plain + one
        assert self.x.grad is not None
        assert_as_accurate(checked(self.x.grad), exact, plain)
        # Each layer's own gradients are those of the layer alone.
        self.step(self.modules[0])
        single = self.modules[0]
        for layer in self.lists[0]:
            for name in ("lora_a", "lora_b"):
                mine, alone = (getattr(owner, name).grad for owner in (layer, single))
                assert_as_accurate(mine, alone.double(), alone.to(dtype).to(alone.dtype))

    def peers(self) -> Mapping[str, Peer]:
        def separate(layers: nn.ModuleList) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
            return lambda x: tuple(layer(x) for layer in layers)

        def several(make: Callable[[], nn.Module], nbytes: int) -> Peer:
            def made() -> Call:
                rotation: Rotation[nn.ModuleList] = self.rotate(
                    nn.ModuleList(make() for _ in range(MANY)), MANY * nbytes
                )
                return lambda i: self.together(separate(rotation[i]), rotation[i])

            return made

        def ours_separate() -> Call:
            return lambda i: self.together(separate(self.lists[i]), self.lists[i])

        dense, rank = self.dense, self.point.R
        return {
            "ours, one by one": ours_separate,
            f"PEFT over {self.point.dtype}": several(
                lambda: peers.peft_layer(peers.dense_linear(dense.clone()), rank), dense.nbytes
            ),
            f"PEFT's formula over {self.point.dtype}": several(
                lambda: peers.UnfusedLoRA(
                    peers.dense_linear(dense.clone()), *dense.shape, rank, peers.ALPHA
                ),
                dense.nbytes,
            ),
        }
