"""quantize, double_quantize, dequantize: the public functions and the checks of their input."""

from __future__ import annotations

import torch

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.dynamic8 import SCALE_BLOCK_SIZE, dynamic8_table
from qlora_kernels.formats.format import Format, check_block_size
from qlora_kernels.formats.operands import StoredOperands
from qlora_kernels.formats.packing import pack_dense, unpack
from qlora_kernels.formats.quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from qlora_kernels.formats.registry import get_format
from qlora_kernels.ops.checks import DTYPE_RULE
from qlora_kernels.ops.encode import encode, encoder_tensors, scale_parts
from qlora_kernels.ops.library import run_dequantize
from qlora_kernels.ops.stored import dense_stored

# Above it 1 / absmax is a denormal and the normalised weights lose bits.
LARGEST_WEIGHT = 2.0**126


def quantize(
    w: torch.Tensor,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    check_finite: bool = True,
    importance: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight to 4 bits (2 or 3 where the format packs densely).

    Args:
        w: fp32, fp16 or bf16 of any shape; non-contiguous is fine.
        format: a registered name or a Format.
        block_size: weights per scale, a power of two in 16 … 4096; None: the format's own (64).
        double_quant: quantize the scales as well; None takes the format's own (True for nf4). A
            format whose scales are stored neither so nor in fp32 keeps its store.
        check_finite: refuse NaN, ±Inf and magnitudes above 2^126. Unchecked, a block that holds
            NaN or Inf comes out as NaN (with double_quant the whole weight does).
        importance: what the squared error of an element counts, to encoders that search scales and
            to learned tables: not negative, of w's shape or one that broadcasts to it ([K]: one
            per input channel). Others ignore it.

    Raises:
        ArgumentTypeError: not a tensor, or another dtype (fp64: convert it yourself, it would be
            rounded silently otherwise).
        ArgumentError: a value the check refuses, an unknown format, a bad block_size.
    """
    if not isinstance(w, torch.Tensor):
        raise type_error("quantize", "w", "a tensor", type(w).__name__)
    if w.dtype not in WEIGHT_DTYPES:
        raise type_error("quantize", "w", "float32, float16 or bfloat16", w.dtype)
    if block_size is not None:
        check_block_size("quantize", block_size)
    fmt = get_format(format, "quantize", "format").override(block_size, double_quant)
    w = w.detach()
    weights = None if importance is None else _checked_importance(w, importance)
    if fmt.encode_against == "original":
        return _quantize_compatibly(w, fmt, check_finite)
    if check_finite and w.numel():
        low, high = w.aminmax()
        if not (float(high) <= LARGEST_WEIGHT and float(low) >= -LARGEST_WEIGHT):
            _refuse_non_finite(w)
    return encode(w, fmt, weights, check_finite)


def _quantize_compatibly(w: torch.Tensor, fmt: Format, check_finite: bool) -> QuantizedWeight:
    """As bitsandbytes: codes against the exact absmax, which is then stored."""
    boundaries, rank_codes = encoder_tensors(fmt.codebook.encoder, torch.float32, w.device)
    ops = torch.ops.qlora_kernels
    codes, absmax = ops.quantize(w, boundaries, rank_codes, fmt.codebook.zero_code, fmt.block_size)
    if check_finite and absmax.numel() and not bool((absmax <= LARGEST_WEIGHT).all()):
        _refuse_non_finite(w)
    parts = scale_parts(fmt, absmax, check_finite)
    if fmt.code_bits != 4:
        codes = pack_dense(unpack(codes, w.numel()), fmt.code_bits)
    return QuantizedWeight(codes=codes, shape=tuple(w.shape), dtype=w.dtype, format=fmt, **parts)


def _checked_importance(w: torch.Tensor, importance: object) -> torch.Tensor:
    if not isinstance(importance, torch.Tensor) or not importance.is_floating_point():
        got = getattr(importance, "dtype", type(importance).__name__)
        raise type_error("quantize", "importance", "a floating-point tensor", got)
    if importance.device != w.device:
        raise argument_error("quantize", "importance", f"on {w.device} like w", importance.device)
    wide = importance.detach().to(torch.float32)
    trailing = tuple(wide.shape) if wide.dim() <= w.dim() else ()
    fits = wide.dim() <= w.dim() and all(
        own in (1, size) for own, size in zip(trailing[::-1], tuple(w.shape)[::-1], strict=False)
    )
    if not fits:
        rule = f"one that broadcasts to {tuple(w.shape)}"
        raise argument_error("quantize", "importance", rule, f"shape {tuple(importance.shape)}")
    if not bool((wide >= 0).all()) or not bool(wide.isfinite().all()):
        raise argument_error("quantize", "importance", "finite and not negative", "other values")
    return wide.expand(w.shape)


def _refuse_non_finite(w: torch.Tensor) -> None:
    flat = w.reshape(-1).to(torch.float32)
    bad = ~(flat.abs() <= LARGEST_WEIGHT)
    index = int(bad.nonzero()[0])
    raise argument_error(
        "quantize",
        "w",
        "finite and at most 2^126 in magnitude",
        f"{int(bad.sum())} other values, the first {float(flat[index])} at flat index {index}",
    )


def double_quantize(
    absmax: torch.Tensor, scale_block_size: int = SCALE_BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize first-level scales fp32 [n_blocks] to 8 bits.

    Returns:
        scale_codes u8 [n_blocks], scale_absmax fp32 [ceil(n_blocks / scale_block_size)],
        scale_offset fp32 [1].

    Raises:
        ArgumentTypeError: absmax is not an fp32 tensor.
        ArgumentError: absmax is not 1-D, or a bad scale_block_size.
    """
    if not isinstance(absmax, torch.Tensor) or absmax.dtype != torch.float32:
        got = getattr(absmax, "dtype", type(absmax).__name__)
        raise type_error("double_quantize", "absmax", "a float32 tensor", got)
    if absmax.dim() != 1:
        raise argument_error("double_quantize", "absmax", "1-D", f"{absmax.dim()}-D")
    check_block_size("double_quantize", scale_block_size, "scale_block_size")
    codes, scale_absmax, offset = torch.ops.qlora_kernels.double_quantize(
        absmax, dynamic8_table(absmax.device), scale_block_size
    )
    return codes, scale_absmax, offset


def dequantize(
    qw: QuantizedWeight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The dense weight.

    Args:
        qw: a quantized weight.
        dtype: fp32, fp16 or bf16; None takes the weight's own (or out's).
        out: written and returned if given: same shape, device and dtype.

    Raises:
        ArgumentTypeError: not a QuantizedWeight, another dtype.
        ArgumentError: out does not fit.
    """
    if not isinstance(qw, QuantizedWeight):
        raise type_error("dequantize", "qw", "a QuantizedWeight", type(qw).__name__)
    dtype = dtype or (out.dtype if out is not None else qw.dtype)
    if dtype not in WEIGHT_DTYPES:
        raise type_error("dequantize", "dtype", DTYPE_RULE, repr(dtype))
    operands = qw.operands()
    stored = isinstance(operands, StoredOperands)
    if out is None:
        ops = torch.ops.qlora_kernels
        op = ops.stored_dequantize if stored else ops.dequantize
        dense: torch.Tensor = op(*operands, dtype)
        return dense
    wanted = (qw.shape, dtype, qw.device)
    if (tuple(out.shape), out.dtype, out.device) != wanted:
        raise argument_error(
            "dequantize", "out", f"{wanted}", (tuple(out.shape), out.dtype, out.device)
        )
    if isinstance(operands, StoredOperands):
        return dense_stored(operands, dtype, out)
    if not out.is_contiguous():
        out.copy_(run_dequantize(operands, dtype))
        return out
    return run_dequantize(operands, dtype, out)
