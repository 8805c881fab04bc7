"""bitsandbytes: its torch ops on this library's kernels, and its 4-bit weights as operands.

`patch_bitsandbytes` registers kernels under bitsandbytes' own op names, for CPU and CUDA tensors;
whatever calls those ops (Linear4bit, Params4bit, PEFT's merge) then runs on them unchanged.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kernels.backends.cpu.common import ISA_NAMES, machine_isa
from qlora_kernels.backends.cpu.matmul_path import choose_path
from qlora_kernels.backends.registry import backend, nothing_forced
from qlora_kernels.formats.bitsandbytes import from_state_dict
from qlora_kernels.formats.dynamic8 import SCALE_BLOCK_SIZE
from qlora_kernels.formats.quantized_weight import QuantizedWeight, WeightOperands
from qlora_kernels.formats.registry import get_format
from qlora_kernels.integrations.blockwise import (
    dequantize_blockwise,
    dequantize_blockwise_out,
    quantize_blockwise,
)
from qlora_kernels.integrations.optional import require
from qlora_kernels.ops import quantize
from qlora_kernels.ops.library import nothing_traces

_NAMESPACE = "bitsandbytes"
_DISPATCH_KEYS = ("CPU", "CUDA")
_MODULES = "bitsandbytes.nn.modules"
_REPACK = "_convert_weight_packed_for_cpu"
# Where a Linear4bit keeps the operands of its weight.
HELD_OPERANDS = "_qlk_operands"
# Ops of the same family that stay bitsandbytes' own.
_LEFT = {
    "quantize_blockwise on CUDA": "8 bits: no kernel of this library",
    "dequantize_blockwise on CUDA": "8 bits: no kernel of this library",
}


@dataclass(frozen=True)
class PatchReport:
    """What `patch_bitsandbytes` did.

    Attributes:
        overridden: names of the ops that run on this library's kernels.
        left: names of the ops beside them that do not, and why.
    """

    overridden: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"overridden  {name}" for name in self.overridden]
        lines += [f"left        {name} ({reason})" for name, reason in self.left.items()]
        return "\n".join(lines)


class _Patch:
    """What is registered at present, and what it replaced."""

    library: torch.library.Library | None = None
    repack: Callable[..., Any] | None = None
    stock_gemv: dict[str, Any]


_patch = _Patch()


def patch_bitsandbytes() -> PatchReport:
    """Run bitsandbytes' 4-bit ops, and on CPUs its 8-bit blockwise ones, on this library's kernels,
    in this process. (On CPUs its 8-bit optimizers are made of these, on GPUs they have their own.)

    Also stops Linear4bit from repacking its weight in eval mode on CPUs with AVX512-BF16: that
    layout rounds the scales to bf16, cannot hold every shape, and is not needed here.
    Patching twice is harmless; `unpatch_bitsandbytes` restores everything.

    Returns:
        The ops that are overridden now, and those that are left alone.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    require(_NAMESPACE, "patch_bitsandbytes")
    names = [name for name in _KERNELS if _is_defined(name)]
    if _patch.library is None:
        _patch.stock_gemv = {
            key.lower(): torch.library.get_kernel(f"{_NAMESPACE}::gemv_4bit", key)
            for key in _DISPATCH_KEYS
        }
        library = torch.library.Library(_NAMESPACE, "IMPL")
        with warnings.catch_warnings():
            # An override is what is wanted; torch warns about the first one.
            warnings.filterwarnings("ignore", message=".*other operators may also be overridden")
            for name in names:
                for key in _DISPATCH_KEYS[: 1 if name in _CPU_ONLY else None]:
                    library.impl(name, _KERNELS[name], key, allow_override=True)
        _patch.library = library
        modules = require(_MODULES, "patch_bitsandbytes")
        if hasattr(modules, _REPACK):
            _patch.repack = getattr(modules, _REPACK)
            setattr(modules, _REPACK, _keep_canonical)
    return PatchReport(
        tuple(f"{_NAMESPACE}::{name}" for name in names),
        {f"{_NAMESPACE}::{name}": reason for name, reason in _LEFT.items()},
    )


def unpatch_bitsandbytes() -> None:
    """Undo `patch_bitsandbytes`; without one, do nothing."""
    if _patch.library is None:
        return
    _patch.library._destroy()
    _patch.library = None
    if _patch.repack is not None:
        setattr(require(_MODULES, "unpatch_bitsandbytes"), _REPACK, _patch.repack)
        _patch.repack = None


def _is_defined(name: str) -> bool:
    packet, _, overload = name.partition(".")
    namespace = getattr(torch.ops, _NAMESPACE)
    return hasattr(namespace, packet) and hasattr(getattr(namespace, packet), overload or "default")


def _keep_canonical(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """In place of the repacking for CPUs: the weight as it is."""
    return weight, state


def layer_operands(layer: Any) -> WeightOperands:
    """The operands of a Linear4bit's weight, which the layer keeps while its tensors are the same
    ones: a look at the weight, a subclass that overrides torch functions, takes microseconds."""
    weight = layer._parameters["weight"]
    state = weight.quant_state
    if not nothing_traces():
        return operands_of(weight, state)
    with torch._C.DisableTorchFunctionSubclass():
        address = weight.data_ptr()
    second = state.state2
    nested = (None, None) if second is None else (second.absmax, second.code)
    tensors = (state.absmax, state.code, state.offset, *nested)
    held = layer.__dict__.get(HELD_OPERANDS)
    if (
        held is not None
        and held[0] is weight
        and held[1] == address
        and all(map(operator.is_, held[2], tensors))
    ):
        kept: WeightOperands = held[3]
        return kept
    operands = operands_of(weight, state)
    # A widened copy would not see what is written to the original.
    if all(t is None or t.dtype in (torch.uint8, torch.float32) for t in tensors):
        layer.__dict__[HELD_OPERANDS] = (weight, address, tensors, operands)
    return operands


def operands_of(weight: torch.Tensor, state: Any) -> WeightOperands:
    """The operands of a bitsandbytes weight and its QuantState; nothing is copied.

    Args:
        weight: the packed bytes in any storage dtype.
        state: a QuantState; absmax and offset in half precision are widened.
    """
    codes, absmax, table = _codes(weight), state.absmax, _fp32(state.code)
    shape, block_size = tuple(state.shape), state.blocksize
    if not state.nested:
        return WeightOperands(
            codes, _fp32(absmax), None, None, None, table, None, shape, block_size, SCALE_BLOCK_SIZE
        )
    second = state.state2
    return WeightOperands(
        codes,
        None,
        absmax,
        _fp32(second.absmax),
        _fp32(state.offset).reshape(1),
        table,
        _fp32(second.code),
        shape,
        block_size,
        second.blocksize,
    )


def quantized_weight_of(weight: torch.Tensor, state: Any) -> QuantizedWeight:
    """A bitsandbytes weight and its QuantState as a QuantizedWeight; tensors are not copied.

    Raises:
        CheckpointError: sizes that do not fit together.
    """
    parts = state.as_dict(packed=True)
    held = {f"weight.{name}": part for name, part in parts.items()}
    return from_state_dict({"weight": weight.detach(), **held}, "weight.")


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32)


def _codes(packed: torch.Tensor) -> torch.Tensor:
    packed = packed.detach()
    if packed.dtype != torch.uint8:
        packed = packed.contiguous().view(torch.uint8)
    return packed.reshape(-1)


def _quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    qw = quantize(A, quant_type, blocksize, double_quant=False, check_finite=False)
    assert qw.absmax is not None
    return qw.codes.view(quant_storage).reshape(-1, 1), qw.absmax


def _dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    table = get_format(quant_type).codebook.table(A.device)
    operands = _operands(A, table, absmax, shape, blocksize)
    dense: torch.Tensor = torch.ops.qlora_kernels.dequantize(*operands, dtype)
    return dense


def _gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
) -> torch.Tensor:
    if absmax.dim() == 2:  # A weight repacked for AVX512-BF16 before the patch.
        kernel = _patch.stock_gemv[A.device.type]
        keys = torch._C._dispatch_keys(A)
        repacked: torch.Tensor = kernel.call_boxed(keys, A, B, shapeB, absmax, code, blocksize)
        return repacked
    operands = _operands(B, code.to(torch.float32), absmax, shapeB, blocksize)
    if A.dtype == torch.float16 and A.device.type == "cpu":
        # This op is by definition the product with the weight rounded to A's dtype, and
        # bitsandbytes' tests divide the difference by outputs near zero: the fused CPU kernel,
        # which multiplies by the weight unrounded, is nearer to the truth and off their mark.
        dense = torch.ops.qlora_kernels.dequantize(*operands, A.dtype)
        return torch.nn.functional.linear(A, dense)
    return _matmul(A, operands, None)


def _gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    table = get_format(quant_type).codebook.table(A.device)
    operands = _operands(B, table, absmax, shapeB, blocksize)
    if absmax_8bit is not None:
        assert absmax_offset is not None
        operands = operands._replace(
            absmax=None,
            scale_codes=absmax_8bit,
            scale_absmax=operands.absmax,
            scale_offset=absmax_offset.to(torch.float32).reshape(1),
            scale_codebook=absmax_code,
        )
    return _matmul(A, operands, bias)


def _operands(
    packed: torch.Tensor,
    table: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    block_size: int,
) -> WeightOperands:
    return WeightOperands(
        _codes(packed),
        _fp32(absmax),
        None,
        None,
        None,
        table,
        None,
        tuple(shape),
        block_size,
        SCALE_BLOCK_SIZE,
    )


def _matmul(x: torch.Tensor, weight: WeightOperands, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    with backend("cpu:avx512") if _as_integers(rows, weight) else nullcontext():
        y: torch.Tensor = torch.ops.qlora_kernels.quantized_matmul(rows, *weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _as_integers(rows: torch.Tensor, weight: WeightOperands) -> bool:
    """Whether a CPU kernel would multiply bf16 as integers, which levels above avx512 do. They are
    as near as is asked for by the norm of a result, and not by elements near zero, at which
    bitsandbytes' tests look."""
    if rows.device.type != "cpu" or rows.dtype != torch.bfloat16 or not nothing_forced():
        return False
    isa = machine_isa()
    if isa <= ISA_NAMES.index("avx512"):
        return False
    out_features, in_features = weight.shape
    return choose_path(rows.shape[0], out_features, in_features, rows.dtype, isa) == "dot"


def _writing(kernel: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """The `.out` overload of a kernel."""

    def into(*arguments: Any, out: torch.Tensor | None = None) -> None:
        *given, last = arguments
        if out is None:
            out = last
        else:
            given.append(last)
        out.copy_(kernel(*given))

    return into


_KERNELS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_4bit.out": _writing(_dequantize_4bit),
    "gemm_4bit": _gemm_4bit,
    "gemv_4bit": _gemv_4bit,
    "gemv_4bit.out": _writing(_gemv_4bit),
    "quantize_blockwise": quantize_blockwise,
    "dequantize_blockwise": dequantize_blockwise,
    "dequantize_blockwise.out": dequantize_blockwise_out,
}
_CPU_ONLY = ("quantize_blockwise", "dequantize_blockwise", "dequantize_blockwise.out")
