"""Without a GPU: the CUDA entries say why they decline, choose their path by sizes alone, and put
their GEMMs together rightly (here on CPU tensors, with the reference's dequantize)."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.cuda import qlora_linear as qlora_entry
from qlora_kernels.backends.cuda import quantized_matmul as matmul_entry
from qlora_kernels.backends.cuda.matmul_path import (
    FUSED_TOKENS,
    MatmulSizes,
    choose_path,
    choose_splits,
    matmul_rejects,
)
from qlora_kernels.backends.device import A100, H200
from qlora_kernels.backends.registry import OPS, Problem, entries
from qlora_kernels.reference import dequantize_reference, dropout_reference
from tests.problems import DTYPES, random_qlora, random_weight
from tests.tolerances import (
    assert_matmul,
    assert_matmul_backward,
    assert_qlora,
    assert_qlora_backward,
)


def problem(**changes: object) -> Problem:
    sizes = {"tokens": 4, "out_features": 512, "in_features": 512, "rank": 8}
    return Problem("quantized_matmul", "cuda", torch.bfloat16, **sizes)._replace(**changes)


def test_every_op_has_an_entry() -> None:
    for op in OPS:
        assert "cuda:sm80" in [entry.backend for entry in entries(op)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_entries_say_that_there_is_no_gpu() -> None:
    for op in OPS:
        entry = next(e for e in entries(op) if e.backend == "cuda:sm80")
        assert entry.available() == "torch sees no CUDA device"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cpu"}, "device must be cuda, got cpu"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"batch_invariant": True, "dtype": torch.float32}, "batch_invariant: dtype must be"),
        ({"batch_invariant": True, "in_features": 100}, "multiple of 64, got 100"),
        ({"batch_invariant": True, "block_size": 32}, "at least 64, got 32"),
    ],
)
def test_rejects_with_a_reason(changes: dict[str, object], reason: str) -> None:
    assert matmul_rejects(problem()) is None
    assert reason in (matmul_rejects(problem(**changes)) or "")


def test_path_follows_from_sizes() -> None:
    sizes = MatmulSizes(FUSED_TOKENS, 512, 512, torch.bfloat16, 64)
    assert choose_path(sizes) == "fused"
    assert choose_path(sizes._replace(tokens=FUSED_TOKENS + 1)) == "dense"
    assert choose_path(sizes._replace(tokens=4000, batch_invariant=True)) == "fused"
    for declined in ({"dtype": torch.float32}, {"in_features": 72}, {"block_size": 32}):
        assert choose_path(sizes._replace(**declined)) == "dense"


def test_splits_fill_the_gpu_and_keep_their_blocks_long() -> None:
    for facts in (A100, H200):
        for rows, cols in ((4096, 4096), (14_336, 4096), (8192, 28_672), (128, 64), (1, 8192)):
            splits = choose_splits(rows, cols, facts.sm_count)
            assert 1 <= splits <= 16
            assert splits == 1 or cols // splits >= 512
            assert -(-rows // 128) * splits <= max(2 * facts.sm_count, -(-rows // 128))
    assert choose_splits(4096, 4096, H200.sm_count) == 8


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries with the reference in place of the two kernels that they launch."""
    for module in (matmul_entry, qlora_entry):
        monkeypatch.setattr(module, "dequantize_cuda", dequantize_reference)
    monkeypatch.setattr(qlora_entry, "dropout_cuda", dropout_reference)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_matmul(dtype: torch.dtype) -> None:
    for shape in ((96, 200), (200, 64)):
        weight = random_weight(shape, 32, "nested")
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(70, shape[1], generator=generator).to(dtype)
        grad_y = torch.randn(70, shape[0], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator)
        assert_matmul(matmul_entry.quantized_matmul_cuda(x, weight, bias), x, weight, bias)
        grad_x = matmul_entry.quantized_matmul_backward_input_cuda(grad_y, weight)
        assert_matmul_backward(grad_x, grad_y, weight)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_qlora_linear(dtype: torch.dtype, dropout_p: float) -> None:
    for rank, adapter_dtype, bias_dtype in ((5, torch.float32, None), (16, dtype, dtype)):
        weight = random_weight((96, 200), 64)
        p = random_qlora(
            70, weight, rank, dtype, adapter_dtype, bias_dtype=bias_dtype, dropout_p=dropout_p
        )
        adapter = (p.lora_a, p.lora_b, p.scaling)
        y, xa = qlora_entry.qlora_linear_cuda(p.x, weight, *adapter, p.bias, p.dropout_p, p.seed)
        assert_qlora(y, xa, p)
        gradients = qlora_entry.qlora_linear_backward_cuda(
            p.grad_y, p.x, xa, weight, *adapter, p.dropout_p, p.seed
        )
        assert_qlora_backward(gradients, p)


@pytest.mark.usefixtures("on_cpu")
def test_gradients_that_nobody_needs_are_empty() -> None:
    p = random_qlora(70, random_weight((96, 200), 64), 4, torch.float32)
    xa = p.x @ p.lora_a.t()
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        gradients = qlora_entry.qlora_linear_backward_cuda(
            p.grad_y, p.x, xa, p.weight, p.lora_a, p.lora_b, p.scaling, needs=needs
        )
        assert [g.numel() > 0 for g in gradients] == list(needs)
