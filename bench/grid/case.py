"""What every case of the grid has: operands in copies, a call, a check, and its cost by formula."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

import qlora_kernels as qlk
from bench.grid.points import Point, storage
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.testing.timing import Call, Rotation

Item = TypeVar("Item")
Peer = Callable[[], Call]


class Case(ABC):
    """One point's work. A subclass sets `nbytes` and `flops`, its cost by formula.

    Attributes:
        nbytes: bytes that have to be read and written at least.
        flops: floating-point operations of its products; 0 for the codecs.
        copies: of the rotated operands.
        with_grad: whether it runs with autograd on.
    """

    with_grad = False
    nbytes: int
    flops = 0

    def __init__(self, point: Point, device: torch.device, rotated_bytes: int) -> None:
        self.point = point
        self.device = device
        self.rotated_bytes = rotated_bytes
        self.copies = 2

    @abstractmethod
    def call(self, i: int) -> object:
        """Ours, on the operands of number i; the caller forces the backend."""

    @abstractmethod
    def verify(self) -> None:
        """Raises AssertionError where ours is wrong; the caller forces the backend."""

    @abstractmethod
    def peers(self) -> Mapping[str, Peer]:
        """Name -> what makes the peer's call; it raises `PeerMissing` where there is none."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element of the point's dtype."""
        return self.point.torch_dtype.itemsize

    def rotate(self, item: Item, nbytes: int) -> Rotation[Item]:
        """Copies of an operand that together miss the caches."""
        rotation = Rotation(lambda _: duplicate(item), nbytes, self.rotated_bytes)
        self.copies = max(self.copies, len(rotation.items))
        return rotation

    def normal(self, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
        """Standard normal values times `scale`, of the point's dtype, on its device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(*shape, generator=generator, device=self.device)
        return (values * scale).to(self.point.torch_dtype)

    def dense_weight(self) -> torch.Tensor:
        """[N, K], distributed as trained weights about are: normal, σ = 0.02."""
        return self.normal(self.point.N, self.point.K, scale=0.02)

    def quantized_weight(self) -> QuantizedWeight:
        """The same, in the point's format."""
        return qlk.quantize(self.dense_weight(), format=storage(self.point.format))


def duplicate(item: Any) -> Any:
    """A copy of a tensor, a quantized weight, a module or a sequence of them in fresh memory."""
    return item.clone() if isinstance(item, torch.Tensor) else copy.deepcopy(item)
