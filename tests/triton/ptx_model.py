"""The few PTX instructions that the Triton kernels have inline, as the PTX ISA defines them under
"prmt", "lop3" and "fma", on int64 tensors that hold 32-bit words."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_MASK = 0xFFFFFFFF


def run_ptx(source: str, registers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every register after the last instruction; `registers` are those set before, by name."""
    state = {name: value.to(torch.int64) & _MASK for name, value in registers.items()}

    def value(operand: str) -> torch.Tensor:
        return state[operand] if operand in state else torch.tensor(int(operand, 0))

    for statement in source.strip().strip("{}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        state[target] = _INSTRUCTIONS[name](*map(value, operands)) & _MASK
    return state


def _prmt(low: torch.Tensor, high: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    low, high, selector = torch.broadcast_tensors(low, high, selector)
    both = torch.stack([(word >> (8 * i)) & 0xFF for word in (low, high) for i in range(4)], -1)
    result = torch.zeros_like(low)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = both.gather(-1, (nibble & 7)[..., None])[..., 0]
        # Bit 3 of a selector replicates the byte's sign.
        byte = torch.where(nibble >= 8, (byte >> 7) * 0xFF, byte)
        result |= byte << (8 * i)
    return result


def _lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    result = torch.zeros((), dtype=torch.int64)
    for index in range(8):
        if (int(table) >> index) & 1:
            terms = [x if index & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def _halves(word: torch.Tensor) -> list[torch.Tensor]:
    words = word.reshape(-1)
    return [((words >> shift) & 0xFFFF).to(torch.uint16).view(torch.bfloat16) for shift in (0, 16)]


def _fma_bf16x2(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    a, b, c = torch.broadcast_tensors(a, b, c)
    result = torch.zeros(a.numel(), dtype=torch.int64)
    for half, (x, y, z) in enumerate(zip(_halves(a), _halves(b), _halves(c), strict=True)):
        # 16 and 8 bits of significand: exact in fp64 for operands of like magnitude.
        exact = (x.double() * y.double() + z.double()).to(torch.bfloat16)
        result |= exact.view(torch.uint16).to(torch.int64) << (16 * half)
    return result.reshape(a.shape)


_INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma_bf16x2,
}
