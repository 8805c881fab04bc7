"""Random matmul problems: quantized weights of any format and scale store, x, adapters, seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from qlora_kernels.formats import Codebook, get_format
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.packing import n_blocks, pack
from qlora_kernels.formats.quantized_weight import WeightOperands

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = ("absmax", "nested")


def random_weight(
    shape: tuple[int, int],
    block_size: int = 64,
    scales: str = "absmax",
    codebook: str | Codebook = "nf4",
    seed: int = 0,
) -> WeightOperands:
    """A weight [N,K] of random codes that the table has, with positive and negative scales.

    Args:
        shape: (N, K).
        block_size: weights per scale.
        scales: "absmax", or "nested" for double quantization.
        codebook: a registered format's name, or a table.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    table = get_format(codebook).codebook if isinstance(codebook, str) else codebook
    numel = math.prod(shape)
    blocks = n_blocks(numel, block_size)
    codes = torch.randint(len(table.values), (numel,), dtype=torch.uint8, generator=generator)
    # The nibble after an odd number of weights may hold anything, NaN where the table is short.
    codes = pack(codes, pad_code=15)
    absmax = scale_codes = scale_absmax = scale_offset = scale_codebook = None
    if scales == "absmax":
        absmax = torch.randn(blocks, generator=generator)
    else:
        scale_codes = torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator)
        scale_absmax = torch.rand(n_blocks(blocks, 256), generator=generator) + 0.1
        scale_offset, scale_codebook = torch.full((1,), 0.05), dynamic8_table()
    return WeightOperands(
        codes,
        absmax,
        scale_codes,
        scale_absmax,
        scale_offset,
        table.table(),
        scale_codebook,
        shape,
        block_size,
        256,
    )


@dataclass(frozen=True)
class QLoRAProblem:
    """Everything a qlora_linear and its backward take; fields in the order of the op."""

    x: torch.Tensor
    weight: WeightOperands
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    bias: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None
    grad_y: torch.Tensor

    def with_x(self, x: torch.Tensor) -> QLoRAProblem:
        """The same problem for another x."""
        return replace(self, x=x)


def random_qlora(
    tokens: int,
    weight: WeightOperands,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    *,
    bias_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    scaling: float = 1.75,
    seed: int = 0,
) -> QLoRAProblem:
    """x [M,K] and grad_y [M,N] of `dtype`, adapters of `adapter_dtype` (default: `dtype`).

    The adapter's product is about as large as the base's, so that neither hides the other's errors.
    """
    rows, cols = weight.shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    adapter = adapter_dtype or dtype
    return QLoRAProblem(
        x=normal(tokens, cols).to(dtype),
        weight=weight,
        lora_a=normal(rank, cols, scale=0.5).to(adapter),
        lora_b=normal(rows, rank, scale=max(rank, 1) ** -0.5).to(adapter),
        scaling=scaling,
        bias=None if bias_dtype is None else normal(rows).to(bias_dtype),
        dropout_p=dropout_p,
        seed=torch.tensor([seed * 7919 - 5], dtype=torch.int64) if dropout_p else None,
        grad_y=normal(tokens, rows).to(dtype),
    )


def operands_on(device: torch.device, operands: WeightOperands) -> WeightOperands:
    """The same weight on `device`."""
    return WeightOperands(
        *(part.to(device) if isinstance(part, torch.Tensor) else part for part in operands)
    )


def problem_on(device: torch.device, problem: QLoRAProblem) -> QLoRAProblem:
    """The same problem on `device`."""
    moved = {"weight": operands_on(device, problem.weight)}
    for name in ("x", "lora_a", "lora_b", "bias", "seed", "grad_y"):
        tensor = getattr(problem, name)
        moved[name] = None if tensor is None else tensor.to(device)
    return replace(problem, **moved)
