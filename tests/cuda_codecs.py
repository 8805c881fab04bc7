"""The codecs' launchers called through a runner, with the arguments of the reference functions."""

from __future__ import annotations

import torch

from qlora_kernels.formats.packing import n_blocks, packed_size
from qlora_kernels.formats.quantized_weight import WeightOperands
from tests.emulation.cuda.runner import Runner

DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # qlk/types.h
SUM_PARTS, SUM_BINS = 128, 12  # qlk/cuda/launch.h


def quantize(
    runner: Runner,
    seed: int,
    weight: torch.Tensor,
    boundaries: torch.Tensor,
    rank_codes: torch.Tensor,
    zero_code: int,
    block_size: int,
    scales: torch.Tensor | None = None,
    *,
    misaligned: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """codes, absmax; `misaligned`: the weight starts one element behind a 16-byte boundary."""
    numel, flat = weight.numel(), weight.reshape(-1)
    if misaligned:
        flat = torch.cat([flat.new_zeros(1), flat])
    got = runner.call(
        "quantize",
        seed=seed,
        integers={
            "weight_shift": flat.element_size() if misaligned else 0,
            "dtype": DTYPE_NUMBERS[weight.dtype],
            "numel": numel,
            "block_size": block_size,
            "n_levels": rank_codes.numel(),
            "zero_code": zero_code,
        },
        inputs={
            "weight": flat,
            "boundaries" if scales is None else "midpoints": boundaries,
            "rank_codes": rank_codes,
            "scales": scales,
        },
        outputs={
            "codes": torch.empty(packed_size(numel), dtype=torch.uint8),
            "absmax": torch.empty(n_blocks(numel, block_size)),
        },
    )
    return got["codes"], got["absmax"]


def double_quantize(
    runner: Runner,
    seed: int,
    absmax: torch.Tensor,
    scale_codebook: torch.Tensor,
    scale_block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale_codes, scale_absmax, scale_offset of at least one scale."""
    count = absmax.numel()
    got = runner.call(
        "double_quantize",
        seed=seed,
        integers={"n_blocks": count, "scale_block_size": scale_block_size},
        inputs={"absmax": absmax, "scale_codebook": scale_codebook},
        outputs={
            "scale_codes": torch.empty(count, dtype=torch.uint8),
            "scale_absmax": torch.empty(n_blocks(count, scale_block_size)),
            "scale_offset": torch.empty(1),
            "partials": torch.empty(SUM_PARTS * SUM_BINS, dtype=torch.int64),
        },
    )
    return got["scale_codes"], got["scale_absmax"], got["scale_offset"]


def dequantize(
    runner: Runner,
    seed: int,
    weights: list[WeightOperands],
    dtype: torch.dtype,
    *,
    pitch: int = 0,
    out_shift: int = 0,
    codes_shift: int = 0,
) -> list[torch.Tensor]:
    """The dense weights, all in one launch.

    Args:
        pitch: elements between the end of a row and the beginning of the next; they must come back
            untouched.
        out_shift: elements by which the results start behind a 16-byte boundary.
        codes_shift: bytes by which the codes do.
    """
    integers = {"count": len(weights), "dtype": DTYPE_NUMBERS[dtype]}
    inputs: dict[str, torch.Tensor | None] = {}
    outputs = {}
    for i, w in enumerate(weights):
        rows, cols = w.shape
        size = rows * (cols + pitch) - pitch if rows else 0
        integers |= {
            f"rows{i}": rows,
            f"cols{i}": cols,
            f"block_size{i}": w.block_size,
            f"scale_block_size{i}": w.scale_block_size,
            f"row_stride{i}": cols + pitch,
            f"out_shift{i}": out_shift * dtype.itemsize,
            f"codes_shift{i}": codes_shift,
        }
        inputs |= {
            f"codes{i}": torch.cat([w.codes.new_zeros(codes_shift), w.codes]),
            f"absmax{i}": w.absmax,
            f"scale_codes{i}": w.scale_codes,
            f"scale_absmax{i}": w.scale_absmax,
            f"scale_offset{i}": w.scale_offset,
            f"codebook{i}": w.codebook,
            f"scale_codebook{i}": w.scale_codebook,
        }
        outputs[f"out{i}"] = torch.empty(out_shift + size, dtype=dtype)
    got = runner.call("dequantize", seed=seed, integers=integers, inputs=inputs, outputs=outputs)
    dense = []
    for i, w in enumerate(weights):
        rows, cols = w.shape
        flat = got[f"out{i}"]
        bits = flat.view(torch.int32 if dtype.itemsize == 4 else torch.int16)
        assert (bits[:out_shift] == -1).all(), "written before the result"
        padded = torch.cat([bits[out_shift:], bits.new_full((pitch if rows else 0,), -1)])
        padded = padded.reshape(rows, cols + pitch)
        assert (padded[:, cols:] == -1).all(), "written between rows"
        dense.append(padded[:, :cols].contiguous().view(dtype))
    return dense
