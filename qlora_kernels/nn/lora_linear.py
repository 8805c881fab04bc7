"""LoRALinear: the adapter of QLoRALinear over a dense, frozen weight: plain LoRA."""

from __future__ import annotations

import torch
from torch import nn

from qlora_kernels.autograd.lora_linear import lora_linear
from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.nn.adapter import LoRAAdapter


class LoRALinear(LoRAAdapter, nn.Linear):
    """y = x Wᵀ + scaling·(dropout(x) Aᵀ) Bᵀ + bias; see `LoRAAdapter`.

    Attributes:
        weight: [N, K] as it was, frozen.
        bias: [N] or None, frozen.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Holds weight and bias, uncopied, and a fresh adapter.

        Raises:
            ArgumentTypeError: a weight that is not a dense tensor.
            ArgumentError: a weight that is not 2-D, a bias of another size, rank outside
                1 … min(N, K), alpha or dropout out of range.
        """
        nn.Module.__init__(self)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            got = getattr(weight, "dtype", type(weight).__name__)
            raise type_error("LoRALinear", "weight", "a floating-point tensor", got)
        if weight.dim() != 2:
            raise argument_error("LoRALinear", "weight", "2-D", f"{weight.dim()}-D")
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise argument_error("LoRALinear", "bias", f"[{self.out_features}]", tuple(bias.shape))
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        held = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", held)
        self._init_adapter(rank, alpha, dropout, rslora, adapter_dtype, weight.device)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> LoRALinear:
        """Add an adapter to a linear layer; its weight and bias are shared, not copied.

        Raises:
            ArgumentTypeError, ArgumentError: not an nn.Linear, or as the constructor.
        """
        if not isinstance(linear, nn.Linear):
            raise type_error("LoRALinear", "linear", "an nn.Linear", type(linear).__name__)
        layer = cls(
            linear.weight,
            linear.bias,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            adapter_dtype=adapter_dtype,
        )
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Nothing: the weight is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N]; see `qlora_kernels.autograd.lora_linear`."""
        merged = self.merged
        if merged is not None:
            return self._merged_forward(merged, input)
        return lora_linear(
            input,
            self.weight,
            self.lora_a,
            self.lora_b,
            self.scaling,
            self.bias,
            self.dropout_p,
            self.training,
        )

    def dense_base(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.detach().to(dtype)

    @property
    def dense_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self) + self._adapter_repr()
