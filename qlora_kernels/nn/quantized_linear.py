"""QuantizedLinear: a frozen linear layer whose weight is stored in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_kernels.autograd.quantized_matmul import quantized_linear_of
from qlora_kernels.backends.kept import requested
from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.nn.stored_weight import StoredWeight
from qlora_kernels.ops import quantize
from qlora_kernels.ops.inference import run_inference


class QuantizedLinear(StoredWeight, nn.Linear):
    """y = x Ŵᵀ + bias with Ŵ [N, K] quantized; x [..., K] of any floating dtype.

    Attributes:
        weight, weight_*: the quantized weight, frozen; see `StoredWeight`.
        bias: [N] or None, frozen as the weight is.
        batch_invariant: see `qlora_kernels.quantized_linear`.
        keep_dense: see `keep_dense_weights`.
    """

    keep_dense: bool = False
    _group: Any = None

    def __init__(
        self, qw: QuantizedWeight, bias: torch.Tensor | None = None, batch_invariant: bool = False
    ) -> None:
        """Holds qw's tensors, uncopied, and the bias.

        Raises:
            ArgumentTypeError: not a QuantizedWeight.
            ArgumentError: qw is not 2-D, or a bias of another size.
        """
        nn.Module.__init__(self)
        self._hold(qw)
        self.out_features, self.in_features = qw.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            name = type(self).__name__
            raise argument_error(name, "bias", f"[{self.out_features}]", tuple(bias.shape))
        self.batch_invariant = batch_invariant
        held = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", held)

    @classmethod
    def from_quantized(
        cls, qw: QuantizedWeight, bias: torch.Tensor | None = None, batch_invariant: bool = False
    ) -> QuantizedLinear:
        """The layer of a quantized weight; raises as the constructor."""
        return cls(qw, bias, batch_invariant)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        format: str | Format = "nf4",
        block_size: int | None = None,
        double_quant: bool | None = None,
        batch_invariant: bool = False,
    ) -> QuantizedLinear:
        """Quantize a linear layer; it is left as it is, and its bias shared.

        Raises:
            ArgumentTypeError, ArgumentError: not an nn.Linear, or as `qlora_kernels.quantize`.
        """
        qw = quantize_linear(cls.__name__, linear, format, block_size, double_quant)
        return cls(qw, linear.bias, batch_invariant).train(linear.training)

    @property
    def group(self) -> Any:
        """The `QLoRAGroup` that answers this layer's calls, or None."""
        return self._group

    @group.setter
    def group(self, group: Any) -> None:
        # A plain attribute: a group holds the layers it is of.
        object.__setattr__(self, "_group", group)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N]; see `compute`."""
        if self.keep_dense and not torch.compiler.is_compiling():
            with requested():
                return self._answer(input)
        # Spelled out: a call of Python is seen in the time of one token's product.
        return self.compute(input) if self._group is None else self._answer(input)

    def _answer(self, input: torch.Tensor) -> torch.Tensor:
        if self._group is not None:
            output: torch.Tensor | None = self._group.output_of(self, input)
            if output is not None:
                return output
        return self.compute(input)

    def compute(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N], by this layer alone; see `qlora_kernels.quantized_linear`."""
        if not self.batch_invariant and not torch.is_grad_enabled():
            weight = self.inference_weight()
            if weight is not None:
                # Not self.bias, which torch looks for in Python.
                y = run_inference(input, weight, self._parameters["bias"])
                if y is not None:
                    return y
        return quantized_linear_of(
            input, self.operands(), self.bias, self.batch_invariant, type(self).__name__
        )

    def reset_parameters(self) -> None:
        """Nothing: a stored weight is not drawn anew."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._format_repr()}"
        )


def keep_dense_weights(model: nn.Module, keep: bool = True) -> int:
    """Let the model's quantized linear layers keep the Ŵ that they dequantize for a forward until
    its backward, which then dequantizes nothing. The results are the same to the bit.

    For layers under activation checkpointing: only the layers of the segment that is recomputed
    hold their Ŵ then, in x's dtype. Without checkpointing every layer of the model would. Kept is
    what the CUDA kernels decode for many tokens and a backward that needs grad_x; elsewhere, and
    while torch.compile traces, nothing changes. Not to be changed between a forward and its
    backward.

    Returns:
        The number of layers that were set.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    for layer in layers:
        layer.keep_dense = keep
    return len(layers)


def quantize_linear(
    op: str,
    linear: nn.Linear,
    format: str | Format,
    block_size: int | None,
    double_quant: bool | None,
) -> QuantizedWeight:
    """The quantized weight of a dense linear layer, checked to be one."""
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise type_error(op, "linear", "an nn.Linear with a dense weight", type(linear).__name__)
    if linear.weight.is_meta:
        raise argument_error(op, "linear", "on a device with values", "a meta weight")
    return quantize(linear.weight, format, block_size, double_quant)
