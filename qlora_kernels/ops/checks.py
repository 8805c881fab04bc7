"""What the public functions refuse, said the same way everywhere: `op: argument must be …, got …`.

Everything below this border (bindings, kernels) trusts its operands, so each rule is here once.
"""

from __future__ import annotations

import math

import torch

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.operands import StoredOperands, WeightOperands
from qlora_kernels.formats.quantized_weight import QuantizedWeight

# fp64 is for gradient checks: the reference alone computes in it.
MATMUL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Of an argument that is a dtype: a string that names one is none.
DTYPE_RULE = "torch.float32, torch.float16 or torch.bfloat16"


def weight_operands(op: str, qw: object) -> WeightOperands | StoredOperands:
    """The operands of a 2-D QuantizedWeight."""
    if not isinstance(qw, QuantizedWeight):
        raise type_error(op, "qw", "a QuantizedWeight", type(qw).__name__)
    if len(qw.shape) != 2:
        raise argument_error(op, "qw", "2-D [out_features, in_features]", f"shape {qw.shape}")
    return qw.operands()


def check_x(op: str, x: object, in_features: int, device: torch.device) -> torch.Tensor:
    """x [..., K] of a floating dtype on the weight's device."""
    if not isinstance(x, torch.Tensor):
        raise type_error(op, "x", "a tensor", type(x).__name__)
    if x.dtype not in MATMUL_DTYPES:
        raise type_error(op, "x", "float32, float16, bfloat16 or float64", x.dtype)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise argument_error(op, "x", f"[..., {in_features}]", f"shape {tuple(x.shape)}")
    if x.device != device:
        raise argument_error(op, "x", f"on {device} like the weight", x.device)
    return x


def check_parameter(
    op: str, argument: str, tensor: object, shape: tuple[int, ...], x: torch.Tensor
) -> None:
    """bias, lora_a or lora_b: of `shape`, on x's device, and no wider than x computes in."""
    if not isinstance(tensor, torch.Tensor):
        raise type_error(op, argument, "a tensor", type(tensor).__name__)
    if tensor.dtype not in MATMUL_DTYPES:
        raise type_error(op, argument, "float32, float16, bfloat16 or float64", tensor.dtype)
    if tensor.dtype == torch.float64 and x.dtype != torch.float64:
        raise type_error(op, argument, f"at most float32 for {x.dtype} x", tensor.dtype)
    if tensor.shape != shape:
        raise argument_error(op, argument, f"{list(shape)}", f"shape {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise argument_error(op, argument, f"on {x.device} like x", tensor.device)


def check_adapter(
    op: str, lora_a: object, lora_b: object, out_features: int, x: torch.Tensor
) -> None:
    """lora_a [R, K] and lora_b [N, R] for x [..., K]."""
    if not isinstance(lora_a, torch.Tensor):
        raise type_error(op, "lora_a", "a tensor", type(lora_a).__name__)
    if lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        raise argument_error(op, "lora_a", f"[rank, {x.shape[-1]}]", f"shape {tuple(lora_a.shape)}")
    rank = lora_a.shape[0]
    check_parameter(op, "lora_a", lora_a, (rank, x.shape[-1]), x)
    check_parameter(op, "lora_b", lora_b, (out_features, rank), x)


def check_finite(op: str, argument: str, value: object) -> float:
    """A finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise type_error(op, argument, "a number", type(value).__name__)
    if not math.isfinite(value):
        raise argument_error(op, argument, "finite", value)
    return float(value)


def check_probability(op: str, argument: str, p: object) -> float:
    """A number in 0 … 1."""
    if not isinstance(p, int | float) or isinstance(p, bool):
        raise type_error(op, argument, "a number", type(p).__name__)
    if not 0.0 <= p <= 1.0:
        raise argument_error(op, argument, "in 0 … 1", p)
    return float(p)


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's dtype where autocast is on, as F.linear would take it (fp64 stays).

    Adapters and biases keep their dtype: the kernels round them as they read them, and their
    gradients come back unrounded. `register_autocast` would cast the fp32 scales as well.
    """
    device_type = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))
