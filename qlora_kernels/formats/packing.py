"""Packing two 4-bit codes into a byte: element 2i in the high nibble, 2i + 1 in the low nibble of
byte i."""

from __future__ import annotations

import torch

from qlora_kernels.errors import argument_error, type_error


def packed_size(numel: int) -> int:
    """Bytes that hold `numel` 4-bit codes."""
    return (numel + 1) // 2


def n_blocks(numel: int, block_size: int) -> int:
    """Blocks of `block_size` elements that cover `numel`; the last one may be short."""
    return -(-numel // block_size)


def pack(codes: torch.Tensor, pad_code: int = 0) -> torch.Tensor:
    """Pack codes u8 [n], each < 16, into u8 [ceil(n / 2)]; an odd n is padded with `pad_code`.

    Raises:
        ArgumentTypeError: codes are not uint8.
        ArgumentError: a code or `pad_code` is above 15.
    """
    if codes.dtype != torch.uint8:
        raise type_error("pack", "codes", "uint8", codes.dtype)
    if not 0 <= pad_code < 16:
        raise argument_error("pack", "pad_code", "in 0 … 15", pad_code)
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) > 15:
        raise argument_error("pack", "codes", "below 16", int(flat.max()))
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_full((1,), pad_code)])
    return (flat[0::2] << 4) | flat[1::2]


def unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The inverse of `pack`: u8 [ceil(numel / 2)] to u8 [numel].

    Raises:
        ArgumentTypeError: packed is not uint8.
        ArgumentError: packed does not hold exactly `numel` codes.
    """
    if packed.dtype != torch.uint8:
        raise type_error("unpack", "packed", "uint8", packed.dtype)
    flat = packed.reshape(-1)
    if flat.numel() != packed_size(numel):
        raise argument_error("unpack", "packed", f"{packed_size(numel)} bytes", flat.numel())
    return torch.stack([flat >> 4, flat & 0xF], dim=1).reshape(-1)[:numel]
