"""ExpertAdapter: LoRA over the stacked matrices of a mixture of experts, and its form in files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qlora_kernels.nn.adapter import LoRAAdapter, check_rank
from qlora_kernels.ops.checks import check_finite

Factors = tuple[torch.Tensor, torch.Tensor, float]


class ExpertAdapter(nn.Module):
    """A and B of every expert of one projection: y += scaling·(x A_eᵀ) B_eᵀ, without dropout.

    Attributes:
        lora_a: [experts, R, K], each expert's drawn as `LoRAAdapter` draws its own.
        lora_b: [experts, N, R], zero at first.
        alpha, rslora: as `LoRAAdapter`'s.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(
        self,
        experts: int,
        shape: tuple[int, ...],
        *,
        rank: int,
        alpha: float,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """An adapter of matrices of `shape` (N, K).

        Raises:
            ArgumentTypeError, ArgumentError: rank outside 1 … min(N, K), alpha not finite.
        """
        super().__init__()
        out_features, in_features = shape
        check_rank("ExpertAdapter", rank, out_features, in_features)
        self.alpha, self.rslora = check_finite("ExpertAdapter", "alpha", alpha), rslora
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.lora_a = nn.Parameter(torch.empty(experts, rank, in_features, **options))
        self.lora_b = nn.Parameter(torch.zeros(experts, out_features, rank, **options))
        bound = 1 / math.sqrt(in_features)  # Kaiming uniform with a = √5
        nn.init.uniform_(self.lora_a, -bound, bound)

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.shape[1]

    @property
    def scaling(self) -> float:
        """The factor on the adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def factors(self) -> Factors:
        """A, B and the scaling, as `experts_linear` takes them."""
        return self.lora_a, self.lora_b, self.scaling

    def delta_weight(self) -> torch.Tensor:
        """ΔW = scaling·B A of every expert, fp32 [experts, N, K]."""
        return self.scaling * (self.lora_b.detach().float() @ self.lora_a.detach().float())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}{', rslora' if self.rslora else ''}"


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every adapter's lora_a and lora_b, in the model's order."""
    for module in model.modules():
        if isinstance(module, LoRAAdapter | ExpertAdapter):
            yield module.lora_a
            yield module.lora_b


def joined(adapters: Sequence[Factors]) -> Factors:
    """Several adapters as one, of the sum of their ranks."""
    if len(adapters) == 1:
        return adapters[0]
    scaling = adapters[0][2]
    lora_a = torch.cat([a for a, _, _ in adapters], dim=1)
    lora_b = torch.cat([b if s == scaling else b * (s / scaling) for _, b, s in adapters], dim=2)
    return lora_a, lora_b, scaling


# In files: PEFT has a wrapper for each adapted parameter of a module, inside that of the next one,
# and keeps A as [experts·R, K] and B as [N, R·experts].


def to_files(adapters: Sequence[ExpertAdapter], swapped: bool) -> dict[str, torch.Tensor]:
    """The tensors of a module's adapters, by what follows its name in PEFT's files.

    Args:
        adapters: in the order of the module's parameters.
        swapped: PEFT takes the module's dense matrices [K, N] for [N, K]; what it has for A and B
            is then the other one, transposed.
    """
    found = {}
    for depth, adapter in enumerate(reversed(adapters)):
        a, b = adapter.lora_a.detach(), adapter.lora_b.detach()
        if swapped:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        inside = ".base_layer" * depth
        found[f"{inside}.lora_A.weight"] = a.reshape(-1, a.shape[2])
        found[f"{inside}.lora_B.weight"] = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return found


def from_file(
    lora_a: torch.Tensor, lora_b: torch.Tensor, experts: int, swapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [experts, R, K] and B [experts, N, R] of a file's two matrices; see `to_files`."""
    a = lora_a.reshape(experts, -1, lora_a.shape[1])
    b = lora_b.reshape(lora_b.shape[0], -1, experts).permute(2, 0, 1)
    return (b.transpose(1, 2), a.transpose(1, 2)) if swapped else (a, b)
