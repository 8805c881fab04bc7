"""Every test of a kernel runs on each instruction-set path that this machine has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

from qlora_kernels.backends.cpu.common import ISA_NAMES, why_unavailable

# The last level that has code of its own, by file; of the matmuls, by dtype: only bf16 has any
# above AVX-512. A level above runs that code, and is spared the tests that have cases beside the
# level; the others show that it does.
_LAST_LEVEL = {
    "test_cpu_quantize": "avx512",
    "test_cpu_double_quantize": "avx512",
    "test_cpu_dropout": "avx512",
    "test_cpu_blockwise": "avx512",
    "test_cpu_dequantize": "avx512_bf16",
}
_MATMULS = ("test_cpu_quantized_matmul", "test_cpu_qlora_linear")


def is_repeated(stem: str, cases: Mapping[str, object]) -> bool:
    """Whether a test of a file, by its parameters, runs only what it has run on a lower level."""
    if len(cases) < 2 or "isa" not in cases:
        return False
    last = _LAST_LEVEL.get(stem)
    if stem in _MATMULS and cases.get("dtype") in (torch.float32, torch.float16):
        last = "avx512"
    level = cases["isa"]
    assert isinstance(level, int)
    return last is not None and level > ISA_NAMES.index(last)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what `is_repeated`."""
    repeated = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and is_repeated(item.path.stem, item.callspec.params)
    ]
    if repeated:
        config.hook.pytest_deselected(items=repeated)
        gone = set(map(id, repeated))
        items[:] = [item for item in items if id(item) not in gone]


@pytest.fixture(params=range(len(ISA_NAMES)), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> int:
    """An index into ISA_NAMES; the test is skipped where the machine lacks that level."""
    reason = why_unavailable(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors are NaN, so that an element which is never written fails the comparison."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all(), "this torch does not fill fresh tensors"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread_then_two() -> Iterator[tuple[int, int]]:
    """The thread counts to compare; torch's own is put back afterwards."""
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)
