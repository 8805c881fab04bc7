"""bitsandbytes: its torch ops on this library's kernels, and its 4-bit weights as operands.

`patch_bitsandbytes` registers kernels under bitsandbytes' own op names, for CPU and CUDA tensors;
whatever calls those ops (Linear4bit, Params4bit, PEFT's merge, its 8-bit optimizers) then runs on
them unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora_kernels.formats.bitsandbytes import from_state_dict
from qlora_kernels.formats.dynamic8 import SCALE_BLOCK_SIZE
from qlora_kernels.formats.quantized_weight import QuantizedWeight, WeightOperands
from qlora_kernels.formats.registry import get_format
from qlora_kernels.integrations.optional import require
from qlora_kernels.ops import quantize
from qlora_kernels.reference.blockwise import (
    dequantize_blockwise_reference,
    quantize_blockwise_reference,
)

_NAMESPACE = "bitsandbytes"
_DISPATCH_KEYS = ("CPU", "CUDA")
_MODULES = "bitsandbytes.nn.modules"
_REPACK = "_convert_weight_packed_for_cpu"


class _Patch:
    """What is registered at present, and what it replaced."""

    library: torch.library.Library | None = None
    repack: Callable[..., Any] | None = None
    stock_gemv: dict[str, Any]


_patch = _Patch()


def patch_bitsandbytes() -> list[str]:
    """Run bitsandbytes' 4-bit and blockwise ops on this library's kernels, in this process.

    Also stops Linear4bit from repacking its weight in eval mode on CPUs with AVX512-BF16: that
    layout rounds the scales to bf16, cannot hold every shape, and is not needed here.
    Patching twice is harmless; `unpatch_bitsandbytes` restores everything.

    Returns:
        The names of the ops that are overridden now.

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
                for key in _DISPATCH_KEYS:
                    library.impl(name, _KERNELS[name], key, allow_override=True)
        _patch.library = library
        modules = require(_MODULES, "patch_bitsandbytes")
        if hasattr(modules, _REPACK):
            _patch.repack = getattr(modules, _REPACK)
            setattr(modules, _REPACK, _keep_canonical)
    return [f"{_NAMESPACE}::{name}" for name in names]


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


def operands_of(weight: torch.Tensor, state: Any) -> WeightOperands:
    """The operands of a bitsandbytes weight and its QuantState; nothing is copied.

    Args:
        weight: the packed bytes in any storage dtype.
        state: a QuantState; absmax and offset in half precision are widened.
    """
    nested = state.nested
    return WeightOperands(
        codes=_codes(weight),
        absmax=None if nested else state.absmax.to(torch.float32),
        scale_codes=state.absmax if nested else None,
        scale_absmax=state.state2.absmax.to(torch.float32) if nested else None,
        scale_offset=state.offset.to(torch.float32).reshape(1) if nested else None,
        codebook=state.code.to(torch.float32),
        scale_codebook=state.state2.code.to(torch.float32) if nested else None,
        shape=tuple(state.shape),
        block_size=state.blocksize,
        scale_block_size=state.state2.blocksize if nested else SCALE_BLOCK_SIZE,
    )


def quantized_weight_of(weight: torch.Tensor, state: Any) -> QuantizedWeight:
    """A bitsandbytes weight and its QuantState as a QuantizedWeight; tensors are not copied.

    Raises:
        CheckpointError: sizes that do not fit together.
    """
    parts = state.as_dict(packed=True)
    held = {f"weight.{name}": part for name, part in parts.items()}
    return from_state_dict({"weight": weight.detach(), **held}, "weight.")


def _codes(packed: torch.Tensor) -> torch.Tensor:
    return packed.detach().contiguous().view(torch.uint8).reshape(-1)


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
    return _matmul(A, _operands(B, code.to(torch.float32), absmax, shapeB, blocksize), None)


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
        absmax.to(torch.float32),
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
    y: torch.Tensor = torch.ops.qlora_kernels.quantized_matmul(rows, *weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _quantize_blockwise(
    A: torch.Tensor, code: torch.Tensor, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_blockwise_reference(A, code, blocksize)


def _dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    return dequantize_blockwise_reference(A, absmax, code, blocksize, dtype)


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
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "dequantize_blockwise.out": _writing(_dequantize_blockwise),
}
