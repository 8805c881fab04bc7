"""QuantizedLinear: a frozen linear layer whose weight is stored in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_kernels.autograd.quantized_matmul import quantized_linear_of
from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight, WeightOperands
from qlora_kernels.ops import dequantize, quantize

# Field of QuantizedWeight -> name of the parameter that holds it.
_PARAMETERS = {
    "codes": "weight",
    "absmax": "weight_absmax",
    "scale_codes": "weight_scale_codes",
    "scale_absmax": "weight_scale_absmax",
    "scale_offset": "weight_scale_offset",
    "scale_codebook": "weight_scale_codebook",
}


class QuantizedLinear(nn.Linear):
    """y = x Ŵᵀ + bias with Ŵ [N, K] quantized; x [..., K] of any floating dtype.

    Every stored tensor is a parameter of an integer dtype, fp32 scales and the codebook as int32
    views of their bits: `.to(dtype)`, autocast and FSDP's mixed precision would round them
    silently otherwise.

    Attributes:
        weight: u8 [ceil(N·K/2)], the packed codes.
        weight_absmax, or weight_scale_codes, weight_scale_absmax, weight_scale_offset: the scales
            (see `QuantizedWeight`); those that the format does not have are None.
        weight_codebook: int32 [16], the bits of the table; a state of another format is refused.
        bias: [N] or None, frozen as the weight is.
        batch_invariant: see `qlora_kernels.quantized_linear`.
    """

    def __init__(
        self, qw: QuantizedWeight, bias: torch.Tensor | None = None, batch_invariant: bool = False
    ) -> None:
        """Holds qw's tensors, uncopied, and the bias.

        Raises:
            ArgumentTypeError: not a QuantizedWeight.
            ArgumentError: qw is not 2-D, or a bias of another size.
        """
        nn.Module.__init__(self)
        name = type(self).__name__
        if not isinstance(qw, QuantizedWeight):
            raise type_error(name, "qw", "a QuantizedWeight", type(qw).__name__)
        if len(qw.shape) != 2:
            raise argument_error(name, "qw", "2-D [out_features, in_features]", f"{qw.shape}")
        self.out_features, self.in_features = qw.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise argument_error(name, "bias", f"[{self.out_features}]", tuple(bias.shape))
        self.format: Format = qw.format
        self.weight_dtype = qw.dtype
        self.batch_invariant = batch_invariant
        for field, parameter in _PARAMETERS.items():
            self.register_parameter(parameter, _frozen_bits(getattr(qw, field)))
        codebook = qw.format.codebook.table(qw.device).clone()
        self.register_parameter("weight_codebook", _frozen_bits(codebook))
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
    def quantized_weight(self) -> QuantizedWeight:
        """The stored weight; it shares the layer's memory."""
        tensors: dict[str, Any] = {}
        for field, parameter in _PARAMETERS.items():
            bits = self._parameters[parameter]
            if bits is not None:
                tensors[field] = _values(bits.detach())
        shape = (self.out_features, self.in_features)
        return QuantizedWeight(shape=shape, dtype=self.weight_dtype, format=self.format, **tensors)

    def operands(self) -> WeightOperands:
        """What the kernels take."""
        # Spelled out, because it is on the path of every forward.
        held, fmt = self._parameters, self.format
        nested = held["weight_absmax"] is None
        return WeightOperands(
            self.weight,
            _values(held["weight_absmax"]),
            held["weight_scale_codes"] if nested else None,
            _values(held["weight_scale_absmax"]) if nested else None,
            _values(held["weight_scale_offset"]) if nested else None,
            _values(held["weight_codebook"]),
            _values(held["weight_scale_codebook"]) if nested else None,
            (self.out_features, self.in_features),
            fmt.block_size,
            fmt.scale_block_size,
        )

    def set_quantized_weight(self, qw: QuantizedWeight) -> None:
        """Hold another weight of the same shape, codebook and block sizes, uncopied.

        Raises:
            ArgumentTypeError: not a QuantizedWeight.
            ArgumentError: a shape, format or device that is not the layer's.
        """
        name = type(self).__name__
        if not isinstance(qw, QuantizedWeight):
            raise type_error(name, "qw", "a QuantizedWeight", type(qw).__name__)
        own = ((self.out_features, self.in_features), self.format, self.weight.device)
        if (qw.shape, qw.format, qw.device) != own:
            raise argument_error(name, "qw", f"{own}", (qw.shape, qw.format, qw.device))
        for field, parameter in _PARAMETERS.items():
            self.register_parameter(parameter, _frozen_bits(getattr(qw, field)))
        self.weight_dtype = qw.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight [N, K]; dtype as in `qlora_kernels.dequantize`."""
        return dequantize(self.quantized_weight, dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the weight that is stored: what PEFT makes adapters of."""
        return self.weight_dtype

    @property
    def W_q(self) -> torch.Tensor:
        """The codes, by the name under which PEFT looks for a layer with `dequantize()`."""
        return self.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N]; see `qlora_kernels.quantized_linear`."""
        return quantized_linear_of(
            input, self.operands(), self.bias, self.batch_invariant, type(self).__name__
        )

    def reset_parameters(self) -> None:
        """Nothing: a stored weight is not drawn anew."""

    def extra_repr(self) -> str:
        fmt = self.format
        nested = ", double_quant" if fmt.double_quant else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={fmt.name}, block_size={fmt.block_size}{nested}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight_codebook"
        table, own = state_dict.get(key), self._parameters["weight_codebook"]
        if isinstance(table, torch.Tensor) and own is not None:
            comparable = not (table.is_meta or own.is_meta) and table.dtype == own.dtype
            if comparable and not torch.equal(table.to(own.device), own):
                error_msgs.append(
                    f"{key}: the state's codebook is not that of format {self.format.name!r}"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


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


def _frozen_bits(tensor: torch.Tensor | None) -> nn.Parameter | None:
    if tensor is None:
        return None
    bits = tensor.view(torch.int32) if tensor.is_floating_point() else tensor
    return nn.Parameter(bits, requires_grad=False)


def _values(bits: torch.Tensor | None) -> Any:
    """The fp32 values behind int32 bits; codes, and what is absent, as they are."""
    if bits is None or bits.dtype != torch.int32:
        return bits
    return bits.view(torch.float32)
