"""bitsandbytes' quantize_blockwise and dequantize_blockwise on the CPU, for any table it has."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qlora_kernels.backends.cpu.blockwise import dequantize_blockwise_cpu, quantize_blockwise_cpu
from qlora_kernels.errors import argument_error

_SIZE = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_blockwise(
    A: torch.Tensor, code: torch.Tensor, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes u8 of A's shape and absmax fp32; code: fp32, up to 256 entries in any order."""
    table, order = _ascending(code)
    values = A if A.dtype in _DTYPES else A.to(torch.float32)
    codes, absmax = quantize_blockwise_cpu(values, table, blocksize)
    return (codes if order is None else order[codes.long()]), absmax


def dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """The values of codes A, of their shape."""
    chosen = dtype if dtype in _DTYPES else torch.float32
    scales = absmax.to(torch.float32)
    return dequantize_blockwise_cpu(A, scales, _padded(code), blocksize, chosen).to(dtype)


def dequantize_blockwise_out(
    A: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """`dequantize_blockwise` into a tensor."""
    out.copy_(dequantize_blockwise(A, absmax, code, blocksize, dtype))


def _padded(code: torch.Tensor) -> torch.Tensor:
    """A table as fp32 [256]; entries that it has not are infinite, and nearest to nothing."""
    if code.numel() > _SIZE:
        raise argument_error("bitsandbytes", "code", f"of up to {_SIZE} entries", code.numel())
    table = code.detach().to(torch.float32).reshape(-1)
    missing = _SIZE - table.numel()
    return F.pad(table, (0, missing), value=torch.inf) if missing else table


def _ascending(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The table sorted, and the code of each of its entries, None where it is sorted as it is."""
    table = _padded(code)
    if bool((table[1:] >= table[:-1]).all()):
        return table, None
    entries, order = table.sort(stable=True)
    return entries, order.to(torch.uint8)
