"""8-bit blockwise codes on the CPU: csrc/kernels_cpu/blockwise.cpp, for bitsandbytes' ops.

No format is stored so, hence no op of this library: the integration calls these.
"""

from __future__ import annotations

import torch

from qlora_kernels.backends.cpu.common import contiguous, machine_isa
from qlora_kernels.formats.packing import n_blocks
from qlora_kernels.reference.blockwise import (
    dequantize_blockwise_reference,
    quantize_blockwise_reference,
)


def quantize_blockwise_cpu(
    values: torch.Tensor, codebook: torch.Tensor, block_size: int, isa: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """codes u8 of values' shape, absmax fp32; see `reference`, which runs without the library.

    Args:
        isa: an index into `ISA_NAMES`; None: the machine's best level.
    """
    isa = machine_isa() if isa is None else isa
    if isa < 0:
        return quantize_blockwise_reference(values, codebook, block_size)
    codes = torch.empty(values.shape, dtype=torch.uint8)
    absmax = torch.empty(n_blocks(values.numel(), block_size), dtype=torch.float32)
    torch.ops.qlora_kernels_cpu.quantize_blockwise.default(
        contiguous(values.detach()), contiguous(codebook), block_size, codes, absmax, isa
    )
    return codes, absmax


def dequantize_blockwise_cpu(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    isa: int | None = None,
) -> torch.Tensor:
    """The values in fp32, fp16 or bf16, of codes' shape; see `quantize_blockwise_cpu`."""
    isa = machine_isa() if isa is None else isa
    if isa < 0:
        return dequantize_blockwise_reference(codes, absmax, codebook, block_size, dtype)
    values = torch.empty(codes.shape, dtype=dtype)
    torch.ops.qlora_kernels_cpu.dequantize_blockwise.default(
        contiguous(codes), contiguous(absmax), contiguous(codebook), block_size, values, isa
    )
    return values
