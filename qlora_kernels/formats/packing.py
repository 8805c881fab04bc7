"""Packing codes into bytes: two of 4 bits a byte, element 2i in the high nibble and 2i + 1 in the
low one; dense codes of 2 or 3 bits as one stream of bits, the first element in the highest ones."""

from __future__ import annotations

import torch

from qlora_kernels.errors import argument_error, type_error


def packed_size(numel: int, bits: int = 4) -> int:
    """Bytes that hold `numel` codes of `bits` bits."""
    return (numel + 1) // 2 if bits == 4 else (numel * bits + 7) // 8


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


def pack_dense(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes u8 [n], each below 2^bits (bits 2 or 3), to u8 [ceil(n · bits / 8)]: a stream, the
    first element in the highest bits, zeros at the end."""
    flat = codes.reshape(-1)
    per_group = 8 if bits == 3 else 4  # codes that fill whole bytes
    numel = flat.numel()
    flat = torch.cat([flat, flat.new_zeros(-numel % per_group)]).view(-1, per_group)
    if bits == 2:
        packed = flat[:, 0] << 6 | flat[:, 1] << 4 | flat[:, 2] << 2 | flat[:, 3]
    else:
        c = flat.unbind(1)
        packed = torch.stack(
            [
                c[0] << 5 | c[1] << 2 | c[2] >> 1,
                c[2] << 7 | c[3] << 4 | c[4] << 1 | c[5] >> 2,
                c[5] << 6 | c[6] << 3 | c[7],
            ],
            dim=1,
        ).reshape(-1)
    return packed[: packed_size(numel, bits)]


def dense_to_nibbles(packed: torch.Tensor, numel: int, bits: int) -> torch.Tensor:
    """u8 [ceil(numel · bits / 8)] as `pack_dense` wrote it, to u8 [ceil(numel / 2)] as `pack`
    would; the nibble after an odd number of codes holds 0."""
    flat = packed.reshape(-1)
    # A group of whole bytes as one integer, its bytes in memory order: the low one comes first.
    if bits == 2:
        word = flat.to(torch.int16)
        nibbles = word >> 2 & 0x30 | word >> 4 & 0x03 | (word & 0x0C) << 10 | (word & 0x03) << 8
    else:
        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 3)]).view(-1, 3)
        a, b, c = (part.to(torch.int32) for part in flat.unbind(1))
        word = a << 16 | b << 8 | c
        nibbles = (word & 0o70000000) >> 17 | (word & 0o7000000) >> 18
        nibbles |= (word & 0o700000) >> 3 | (word & 0o70000) >> 4
        nibbles |= (word & 0o7000) << 11 | (word & 0o700) << 10
        nibbles |= (word & 0o70) << 25 | (word & 0o7) << 24
    return nibbles.view(torch.uint8)[: packed_size(numel)]
