"""quantize, double_quantize, dequantize: the public functions and the checks of their input."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.codebook import Encoder, constant_tensor
from qlora_kernels.formats.dynamic8 import SCALE_BLOCK_SIZE, dynamic8_table
from qlora_kernels.formats.format import Format, check_block_size
from qlora_kernels.formats.quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from qlora_kernels.formats.registry import get_format
from qlora_kernels.ops.library import run_dequantize
from qlora_kernels.reference import decode_scales_reference

# Above it 1 / absmax is a denormal and the normalised weights lose bits.
LARGEST_WEIGHT = 2.0**126


def _encoder_tensors(
    encoder: Encoder, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    boundaries, codes = encoder.boundaries, encoder.rank_codes
    return (
        constant_tensor(boundaries, boundaries, dtype, device),
        constant_tensor(codes, codes, torch.uint8, device),
    )


def quantize(
    w: torch.Tensor,
    format: str | Format = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    check_finite: bool = True,
) -> QuantizedWeight:
    """Quantize a weight to 4 bits.

    Args:
        w: fp32, fp16 or bf16 of any shape; non-contiguous is fine.
        format: a registered name or a Format.
        block_size: weights per scale, a power of two in 32 … 4096; None: the format's own (64).
        double_quant: quantize the scales as well; None takes the format's own (True for nf4).
        check_finite: refuse NaN, ±Inf and magnitudes above 2^126. Unchecked, a block that holds
            NaN or Inf comes out as NaN (with double_quant the whole weight does).

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
    fmt = get_format(format).override(block_size, double_quant)
    w = w.detach()
    boundaries, rank_codes = _encoder_tensors(fmt.codebook.encoder, torch.float32, w.device)
    zero_code = fmt.codebook.zero_code
    ops = torch.ops.qlora_kernels
    codes, absmax = ops.quantize(w, boundaries, rank_codes, zero_code, fmt.block_size)
    if check_finite and absmax.numel() and not bool((absmax <= LARGEST_WEIGHT).all()):
        _refuse_non_finite(w)
    scales: dict[str, Any] = {"absmax": absmax}
    if fmt.double_quant:
        parts = ops.double_quantize(absmax, dynamic8_table(w.device), fmt.scale_block_size)
        scales = dict(zip(("scale_codes", "scale_absmax", "scale_offset"), parts, strict=True))
    qw = QuantizedWeight(codes=codes, shape=tuple(w.shape), dtype=w.dtype, format=fmt, **scales)
    if fmt.encode_against == "decoded" and fmt.double_quant:
        exact, ranks = _encoder_tensors(fmt.codebook.exact_encoder, torch.float64, w.device)
        decoded = decode_scales_reference(qw.operands())
        codes, _ = ops.quantize(w, exact, ranks, zero_code, fmt.block_size, decoded)
        qw = QuantizedWeight(codes=codes, shape=tuple(w.shape), dtype=w.dtype, format=fmt, **scales)
    return qw


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
        raise type_error("dequantize", "dtype", "float32, float16 or bfloat16", dtype)
    operands = qw.operands()
    if out is None:
        dense: torch.Tensor = torch.ops.qlora_kernels.dequantize(*operands, dtype)
        return dense
    wanted = (qw.shape, dtype, qw.device)
    if (tuple(out.shape), out.dtype, out.device) != wanted:
        raise argument_error(
            "dequantize", "out", f"{wanted}", (tuple(out.shape), out.dtype, out.device)
        )
    if not out.is_contiguous():
        out.copy_(run_dequantize(operands, dtype))
        return out
    return run_dequantize(operands, dtype, out)
