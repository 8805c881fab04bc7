"""LoRAAdapter: what QLoRALinear and LoRALinear have in common: A, B, scaling, dropout, merging."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qlora_kernels.errors import argument_error
from qlora_kernels.ops.checks import autocast_input, check_finite, check_probability


class LoRAAdapter(nn.Module, ABC):
    """Mixin of a linear layer: y += scaling·(dropout(x) Aᵀ) Bᵀ.

    Attributes:
        lora_a: [R, K], drawn as nn.Linear draws its weight (Kaiming uniform, a = √5).
        lora_b: [N, R], zero at first, so that the adapter starts as nothing.
        rank, alpha, rslora: scaling is alpha / R, or alpha / √R with rslora (Kalajdzievski,
            "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023).
        dropout_p: probability with which an element of x is dropped for the adapter in training.
    """

    in_features: int
    out_features: int
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    _merged: nn.Linear | None = None

    def _init_adapter(
        self,
        rank: int,
        alpha: float,
        dropout: float,
        rslora: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        name = type(self).__name__
        check_rank(name, rank, self.out_features, self.in_features)
        self.dropout_p = check_probability(name, "dropout", dropout)
        self.alpha = check_finite(name, "alpha", alpha)
        self.rslora = rslora
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=device))
        # A plain attribute: a merged weight is a cache, not part of the state.
        object.__setattr__(self, "_merged", None)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draw A anew from torch's default generator and set B to zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.shape[0]

    @property
    def scaling(self) -> float:
        """The factor on the adapter's product."""
        return self._scaling_of(self.lora_a)

    def _scaling_of(self, lora_a: torch.Tensor) -> float:
        rank = lora_a.shape[0]
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def delta_weight(self) -> torch.Tensor:
        """ΔW = scaling·B A, fp32 [N, K]."""
        return self.scaling * (self.lora_b.detach().float() @ self.lora_a.detach().float())

    @abstractmethod
    def dense_base(self, dtype: torch.dtype) -> torch.Tensor:
        """The base weight [N, K] in `dtype`."""

    @property
    def merged(self) -> nn.Linear | None:
        """The dense layer that stands in for this one, or None."""
        return self._merged

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Fold the adapter into a dense layer, which this layer computes with until `unmerge`.

        Returns:
            nn.Linear with Ŵ + ΔW, summed in fp32 and rounded once to the base weight's dtype, and
            this layer's bias. Changing the adapter does not change it.
        """
        dense = self.dense_base(torch.float32) + self.delta_weight()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dense.to(self.dense_dtype), requires_grad=False)
        linear.register_parameter("bias", self._parameters["bias"])
        object.__setattr__(self, "_merged", linear.train(self.training))
        return linear

    def unmerge(self) -> None:
        """Forget the merged weight. Exact: base and adapter were never changed."""
        object.__setattr__(self, "_merged", None)

    @property
    @abstractmethod
    def dense_dtype(self) -> torch.dtype:
        """The dtype of the base weight when dense."""

    def _merged_forward(self, merged: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled() and self.lora_a.requires_grad:
            name = type(self).__name__
            raise argument_error(
                name, "layer", "unmerged to be trained (call unmerge())", "a merged one"
            )
        x = autocast_input(x)
        bias = None if merged.bias is None else merged.bias.to(x.dtype)
        return F.linear(x, merged.weight.to(x.dtype), bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LoRAAdapter:
        """Moves and casts the merged weight along."""
        super()._apply(fn, recurse)
        if self.merged is not None:
            self.merged._apply(fn)
        return self

    def _adapter_repr(self) -> str:
        scheme = ", rslora" if self.rslora else ""
        dropout = f", dropout={self.dropout_p}" if self.dropout_p else ""
        return f", rank={self.rank}, alpha={self.alpha:g}{scheme}{dropout}"


def check_rank(op: str, rank: object, out_features: int, in_features: int) -> None:
    """A whole number in 1 … min(N, K)."""
    largest = min(out_features, in_features)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= largest:
        rule = f"a whole number in 1 … {largest} (min of {out_features} and {in_features})"
        raise argument_error(op, "rank", rule, rank)
