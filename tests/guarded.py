"""Tensors that end, or begin, at a page that must not be touched: a kernel that reads or writes
beside its operands dies of SIGSEGV. Run as a program (see tests/backends/test_cpu_bounds.py) with
the level as its argument; it says how many problems it has survived.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from dataclasses import replace

import torch

from qlora_kernels.backends.cpu.common import why_unavailable
from qlora_kernels.backends.cpu.dropout import dropout_cpu
from qlora_kernels.backends.cpu.qlora_linear import qlora_linear_backward_cpu, qlora_linear_cpu
from qlora_kernels.backends.cpu.quantized_matmul import (
    quantized_matmul_backward_input_cpu,
    quantized_matmul_cpu,
)
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.testing.shapes import RAGGED_WEIGHTS
from tests.problems import DTYPES, SCALES, random_qlora, random_weight

PAGE = mmap.PAGESIZE
_PROT_NONE = 0  # which the mmap module does not name
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guard:
    """Gives out guarded copies until `release`.

    Args:
        at_end: whether a tensor's last byte is the last before the forbidden page, or its first the
            first after one.
    """

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._mapped: list[tuple[int, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of undefined contents between forbidden pages."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.zeros(shape, dtype=dtype)
        pages = -(-nbytes // PAGE)
        size = (pages + 2) * PAGE
        private_anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = _libc.mmap(None, size, _PROT_NONE, private_anonymous, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value), ctypes.get_errno()
        self._mapped.append((base, size))
        inside = base + PAGE
        assert _libc.mprotect(inside, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        first = inside + (pages * PAGE - nbytes if self.at_end else 0)
        buffer = (ctypes.c_char * nbytes).from_address(first)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in guarded memory."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def weight(self, weight: WeightOperands) -> WeightOperands:
        """The same weight in guarded memory."""
        return WeightOperands(
            *(self.copy(field) if isinstance(field, torch.Tensor) else field for field in weight)
        )

    def release(self) -> None:
        """Unmap everything; the tensors must be gone."""
        for base, size in self._mapped:
            _libc.munmap(base, size)
        self._mapped.clear()


def guard_results(guard: Guard) -> None:
    """The results that the Python entries allocate are guarded from now on."""

    def new_empty(like: torch.Tensor, *shape: int | torch.Size) -> torch.Tensor:
        sizes = shape[0] if shape and not isinstance(shape[0], int) else shape
        return guard.empty(tuple(sizes), like.dtype)

    torch.Tensor.new_empty = new_empty
    torch.empty_like = lambda like: guard.empty(tuple(like.shape), like.dtype)


# The last two end in a part and in the whole of what the vector loops take at a time.
SHAPES = (*RAGGED_WEIGHTS, (130, 1032), (9, 256))


def run_problem(isa: int, guard: Guard, index: int, tokens: int, dtype: torch.dtype) -> None:
    """A matmul and a qlora_linear, forward and backward, over guarded operands."""
    shape = SHAPES[index % len(SHAPES)]
    weight = guard.weight(random_weight(shape, (32, 64, 4096)[index % 3], SCALES[index % 2]))
    p = random_qlora(
        tokens,
        weight,
        1 + 7 * index % 40,
        dtype,
        DTYPES[index % 3],
        bias_dtype=DTYPES[index % 3],
        dropout_p=0.3,
        seed=index,
    )
    fields = {
        name: guard.copy(value)
        for name, value in vars(p).items()
        if isinstance(value, torch.Tensor)
    }
    p = replace(p, **fields)
    quantized_matmul_cpu(isa, p.x, weight, p.bias)
    quantized_matmul_backward_input_cpu(isa, p.grad_y, weight)
    dropout_cpu(isa, p.x, 0.3, p.seed)
    adapter = (p.weight, p.lora_a, p.lora_b, p.scaling)
    _, xa = qlora_linear_cpu(isa, p.x, *adapter, p.bias, p.dropout_p, p.seed)
    qlora_linear_backward_cpu(isa, p.grad_y, p.x, guard.copy(xa), *adapter, p.dropout_p, p.seed)


def main(isa: int) -> None:
    """Every path of a level."""
    reason = why_unavailable(isa)
    assert reason is None, reason
    count = 0
    for at_end in (True, False):
        guard = Guard(at_end)
        guard_results(guard)
        for index in range(2 * len(SHAPES)):
            for dtype in DTYPES:
                for tokens in (1, 3, 18, 33, 70):
                    run_problem(isa, guard, index, tokens, dtype)
                    guard.release()
                    count += 1
    sys.stdout.write(f"survived {count} problems\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
