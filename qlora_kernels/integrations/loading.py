"""Conversions that transformers applies to a checkpoint's tensors while it loads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from qlora_kernels.errors import ArgumentError, CheckpointError
from qlora_kernels.formats.bitsandbytes import from_state_dict
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.nn import QuantizedExperts, QuantizedLinear
from qlora_kernels.nn.quantized_experts import expert_parameters
from qlora_kernels.ops import quantize

BITSANDBYTES_NAMES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer is transformers' Conv1D, which stores [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def dense_layer(weight: torch.Tensor, like: Any) -> nn.Module:
    """The dense layer of a weight [N, K] and the bias of `like`, frozen: nn.Linear, or Conv1D if
    that is what a quantized layer was made from."""
    rows, cols = weight.shape
    was_conv1d = getattr(like, "source_cls", None) is not None and (
        like.source_cls.__name__ == "Conv1D"
    )
    layer: Any
    if was_conv1d or getattr(like, "source_is_transposed", False):
        layer = Conv1D(0, 0)
        layer.nf, layer.nx, weight = rows, cols, weight.t().contiguous()
        del layer.bias
    else:
        layer = nn.Linear(cols, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    bias = like.bias
    if bias is not None:
        bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    layer.register_parameter("bias", bias)
    module: nn.Module = layer.train(like.training)
    return module


def parameters_of(qw: QuantizedWeight) -> dict[str, nn.Parameter]:
    """A quantized weight's tensors by the names of `QuantizedLinear`'s parameters."""
    return dict(QuantizedLinear(qw).named_parameters())


def _first(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _fill(model: Any, full_name: str, qw: QuantizedWeight) -> dict[str, nn.Parameter]:
    """The parameters of a layer by their full names; those it was not made with are added to it."""
    path = full_name.rpartition(".")[0]
    layer = model.get_submodule(path)
    layer.format, layer.weight_dtype = qw.format, qw.dtype
    found = {}
    for name, parameter in parameters_of(qw).items():
        if layer._parameters[name] is None:
            layer.register_parameter(name, parameter)
        else:
            found[f"{path}.{name}" if path else name] = parameter
    return found


def _refused(op: Any, name: str, like: QuantizedWeight, error: Exception) -> QuantizedWeight:
    """Note what a weight is refused for, to be raised when loading is done: what a conversion
    raises ends in a printed report, and the exception that follows names nothing. A stand-in."""
    op.hf_quantizer.refused[name] = str(error)
    return QuantizedWeight.empty(like.shape, like.dtype, like.format, "cpu")


class QuantizeOnLoad(ConversionOps):
    """A dense weight, or a stack of experts', to the parameters of the quantized layer."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **context: Any) -> dict[str, Any]:
        """Quantize each tensor under its full name."""
        model = context["model"]
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            path, _, projection = name.rpartition(".")
            layer = model.get_submodule(path)
            weight = _first(value)
            if isinstance(layer, QuantizedExperts):
                fmt = layer.projections[projection].format
                if layer.source_is_transposed:
                    weight = weight.transpose(1, 2)
                try:
                    matrices = [quantize(w, fmt) for w in weight]
                except ArgumentError as error:
                    like = layer.projections[projection]
                    matrices = [_refused(self, name, like, error)] * layer.num_experts
                stack = expert_parameters(projection, matrices)
                result.update({f"{path}.{key}": tensor for key, tensor in stack.items()})
                continue
            if layer.source_is_transposed:
                weight = weight.t()
            try:
                qw = quantize(weight, layer.format)
            except ArgumentError as error:
                qw = _refused(self, name, layer.quantized_weight, error)
            result.update(_fill(model, name, qw))
        return result


class FromBitsAndBytes(ConversionOps):
    """bitsandbytes' tensors of one weight to the parameters of a quantized layer, uncopied."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> FromBitsAndBytes:
        # Loading copies a conversion for every weight; there is one quantizer.
        return self

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **context: Any) -> dict[str, Any]:
        """A weight by its full name; a dense one is cast to the model's dtype."""
        model, full_layer_name = context["model"], context["full_layer_name"]
        tensors = {name: _first(value) for name, value in input_dict.items()}
        if len(tensors) == 1:
            wanted = model.get_parameter_or_buffer(full_layer_name).dtype
            weight = tensors["weight"]
            return {full_layer_name: weight.to(wanted) if weight.is_floating_point() else weight}
        try:
            qw = from_state_dict(tensors, "weight.")
        except CheckpointError as error:
            layer = model.get_submodule(full_layer_name.rpartition(".")[0])
            qw = _refused(self, full_layer_name, layer.quantized_weight, error)
        return _fill(model, full_layer_name, qw)
