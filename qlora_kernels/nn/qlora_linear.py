"""QLoRALinear: a quantized base weight with a LoRA adapter, forward and backward fused."""

from __future__ import annotations

import torch
from torch import nn

from qlora_kernels.autograd.qlora_linear import qlora_linear_of
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.nn.adapter import LoRAAdapter
from qlora_kernels.nn.quantized_linear import QuantizedLinear, quantize_linear
from qlora_kernels.ops.inference import run_inference


class QLoRALinear(LoRAAdapter, QuantizedLinear):
    """y = x Ŵᵀ + scaling·(dropout(x) Aᵀ) Bᵀ + bias; see `QuantizedLinear` and `LoRAAdapter`.

    A and B are fp32 by default whatever x is: they are rounded to x's dtype to be multiplied, and
    get fp32 gradients.
    """

    def __init__(
        self,
        qw: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        batch_invariant: bool = False,
    ) -> None:
        """Holds qw's tensors, uncopied, and a fresh adapter.

        Raises:
            ArgumentTypeError, ArgumentError: as `QuantizedLinear`; rank outside 1 … min(N, K);
                alpha or dropout out of range.
        """
        QuantizedLinear.__init__(self, qw, bias, batch_invariant)
        self._init_adapter(rank, alpha, dropout, rslora, adapter_dtype, qw.device)

    @classmethod
    def from_quantized(  # type: ignore[override]
        cls,
        qw: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        batch_invariant: bool = False,
    ) -> QLoRALinear:
        """The layer of a quantized weight; raises as the constructor."""
        return cls(
            qw,
            bias,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            adapter_dtype=adapter_dtype,
            batch_invariant=batch_invariant,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        format: str | Format = "nf4",
        block_size: int | None = None,
        double_quant: bool | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        batch_invariant: bool = False,
    ) -> QLoRALinear:
        """Quantize a linear layer and add an adapter; it is left as it is, and its bias shared.

        A `QuantizedLinear` keeps its tensors: format, block_size and double_quant do not apply.

        Raises:
            ArgumentTypeError, ArgumentError: as the constructor and `qlora_kernels.quantize`.
        """
        if isinstance(linear, QuantizedLinear):
            qw = linear.quantized_weight
        else:
            qw = quantize_linear(cls.__name__, linear, format, block_size, double_quant)
        layer = cls(
            qw,
            linear.bias,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            adapter_dtype=adapter_dtype,
            batch_invariant=batch_invariant,
        )
        return layer.train(linear.training)

    def compute(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N], by this layer alone; see `qlora_kernels.qlora_linear`."""
        if self._merged is not None:
            return self._merged_forward(self._merged, input)
        dropout_p = self.dropout_p if self.training else 0.0
        if dropout_p == 0.0 and not self.batch_invariant and not torch.is_grad_enabled():
            weight = self.inference_weight()
            # Not self.lora_a, which torch looks for in Python.
            held = self._parameters
            lora_a, lora_b = held.get("lora_a"), held.get("lora_b")
            if weight is not None and lora_a is not None and lora_b is not None:
                scaling = self._scaling_of(lora_a)
                y = run_inference(input, weight, held["bias"], lora_a, lora_b, scaling)
                if y is not None:
                    return y
        return qlora_linear_of(
            input,
            self.operands(),
            self.lora_a,
            self.lora_b,
            self.scaling,
            self.bias,
            dropout_p,
            self.batch_invariant,
            type(self).__name__,
        )

    def dense_base(self, dtype: torch.dtype) -> torch.Tensor:
        return self.dequantize(dtype)

    @property
    def dense_dtype(self) -> torch.dtype:
        return self.weight_dtype

    def extra_repr(self) -> str:
        return QuantizedLinear.extra_repr(self) + self._adapter_repr()
