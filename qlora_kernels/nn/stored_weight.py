"""StoredWeight: what layers over a quantized weight have in common: its tensors as parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.dynamic8 import shared_cpu_table
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.operands import StoredOperands, WeightOperands, assemble_operands
from qlora_kernels.formats.quantized_weight import (
    TENSOR_FIELDS,
    QuantizedWeight,
    bits_of,
    values_of,
)
from qlora_kernels.ops import dequantize

# Field of QuantizedWeight -> name of the parameter that holds it.
_PARAMETERS = {
    field: "weight" if field == "codes" else f"weight_{field}" for field in TENSOR_FIELDS
}


class StoredWeight(nn.Module):
    """Mixin of a layer that holds a `QuantizedWeight`.

    Every stored tensor is a parameter of an integer dtype, scales, shifts and tables as int32 or
    int16 views of their bits: `.to(dtype)`, autocast and FSDP's mixed precision would round them
    silently otherwise.

    Attributes:
        weight: u8, the packed codes.
        weight_absmax, or weight_scale_codes, weight_scale_absmax, weight_scale_offset: the scales;
            weight_shift, or weight_shift_*: the shifts; weight_tables: a learned table (see
            `QuantizedWeight`); those that the format does not have are None.
        weight_codebook: int32 [16], the bits of the format's table, None where tables are learned;
            a state of another format is refused.
        weight_shape, weight_dtype: of the weight that is stored.
    """

    weight: torch.Tensor

    def _hold(self, qw: QuantizedWeight) -> None:
        """Hold qw's tensors, uncopied.

        Raises:
            ArgumentTypeError: not a QuantizedWeight.
            ArgumentError: qw is not 2-D.
        """
        name = type(self).__name__
        if not isinstance(qw, QuantizedWeight):
            raise type_error(name, "qw", "a QuantizedWeight", type(qw).__name__)
        if len(qw.shape) != 2:
            raise argument_error(name, "qw", "2-D [out_features, in_features]", f"{qw.shape}")
        self.format: Format = qw.format
        # Whether the stored tensors are what kernels take; asked on every forward.
        self._is_plain = qw.format.plain and qw.format.scale_store in ("fp32", "double_quant")
        self.weight_shape: tuple[int, ...] = qw.shape
        self.weight_dtype = qw.dtype
        for field, parameter in _PARAMETERS.items():
            self.register_parameter(parameter, _frozen_bits(getattr(qw, field)))
        learned = qw.tables is not None
        codebook = None if learned else qw.format.codebook.table(qw.device).clone()
        self.register_parameter("weight_codebook", _frozen_bits(codebook))

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The stored weight; it shares the layer's memory."""
        shape, tensors = self.weight_shape, self._tensors()
        return QuantizedWeight(shape=shape, dtype=self.weight_dtype, format=self.format, **tensors)

    def _tensors(self) -> dict[str, Any]:
        """The stored tensors by field of QuantizedWeight, in their own dtypes."""
        found: dict[str, Any] = {}
        for field, parameter in _PARAMETERS.items():
            bits = self._parameters[parameter]
            if bits is not None:
                found[field] = values_of(bits.detach(), field, self.format)
        return found

    def operands(self) -> WeightOperands | StoredOperands:
        """What the ops take."""
        held, fmt = self._parameters, self.format
        if not self._is_plain:
            codebook = _values(held["weight_codebook"])
            return assemble_operands(fmt, self.weight_shape, self._tensors(), codebook)
        # Spelled out, because it is on the path of every forward.
        nested = held["weight_absmax"] is None
        return WeightOperands(
            self.weight,
            _values(held["weight_absmax"]),
            held["weight_scale_codes"] if nested else None,
            _values(held["weight_scale_absmax"]) if nested else None,
            _values(held["weight_scale_offset"]) if nested else None,
            _values(held["weight_codebook"]),
            _values(held["weight_scale_codebook"]) if nested else None,
            self.weight_shape,
            fmt.block_size,
            fmt.scale_block_size,
        )

    def inference_weight(self) -> tuple[Any, ...] | None:
        """What `run_inference` takes: the parameters themselves, as `WeightOperands.flat` has them;
        None where they are not plain tensors (a sharded weight), or not what kernels take."""
        held, fmt = self._parameters, self.format
        codes, absmax = held["weight"], held["weight_absmax"]
        scale_codebook: torch.Tensor | None = held["weight_scale_codebook"]
        if type(codes) is not Parameter or not self._is_plain:
            return None
        if scale_codebook is None and absmax is None:
            scale_codebook = shared_cpu_table()
        return (
            codes,
            absmax,
            held["weight_scale_codes"],
            held["weight_scale_absmax"],
            held["weight_scale_offset"],
            held["weight_codebook"],
            scale_codebook,
            *self.weight_shape,
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
        own = (self.weight_shape, self.format, self.weight.device)
        if (qw.shape, qw.format, qw.device) != own:
            raise argument_error(name, "qw", f"{own}", (qw.shape, qw.format, qw.device))
        for field, parameter in _PARAMETERS.items():
            self.register_parameter(parameter, _frozen_bits(getattr(qw, field)))
        self.weight_dtype = qw.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight; dtype as in `qlora_kernels.dequantize`."""
        return dequantize(self.quantized_weight, dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the weight that is stored: what PEFT makes adapters of."""
        return self.weight_dtype

    @property
    def W_q(self) -> torch.Tensor:
        """The codes, by the name under which PEFT looks for a layer with `dequantize()`."""
        return self.weight

    def _format_repr(self) -> str:
        fmt = self.format
        store = "" if fmt.scale_store == "fp32" else f", {fmt.scale_store}"
        return f"format={fmt.name}, block_size={fmt.block_size}{store}"

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


def _frozen_bits(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(bits_of(tensor), requires_grad=False)


def _values(bits: torch.Tensor | None) -> Any:
    """The fp32 values behind int32 bits; codes, and what is absent, as they are."""
    if bits is None or bits.dtype != torch.int32:
        return bits
    return bits.view(torch.float32)
