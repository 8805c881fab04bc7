"""Without a GPU: the CUDA entries say why they decline, choose their path by sizes alone, and put
their GEMMs together rightly (here on CPU tensors, with the reference's dequantize)."""

from __future__ import annotations

import types

import pytest
import torch

from qlora_kernels.backends.cuda import dequantize as dequantize_entry
from qlora_kernels.backends.cuda import low_rank
from qlora_kernels.backends.cuda import qlora_linear as qlora_entry
from qlora_kernels.backends.cuda import quantized_matmul as matmul_entry
from qlora_kernels.backends.cuda.gradient_path import (
    GradientSizes,
    choose_gradient_path,
    choose_token_slices,
    describe,
    gradient_costs,
    projects_while_copying,
)
from qlora_kernels.backends.cuda.matmul_path import (
    FUSED_TOKENS,
    MatmulSizes,
    choose_path,
    choose_splits,
    matmul_rejects,
)
from qlora_kernels.backends.device import A100, H200
from qlora_kernels.backends.registry import OPS, Problem, entries
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import dequantize_reference, dropout_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
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
        ({"batch_invariant": True, "in_features": 2**31}, "at most 2^30, got 2147483648"),
        ({"batch_invariant": True, "out_features": 2**24}, "at most 8388480, got 16777216"),
        (
            {"batch_invariant": True, "out_features": 2**22, "in_features": 2**16},
            "at most 2^37 elements",
        ),
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


def adapter_gradients(
    grad_y: torch.Tensor,
    xa: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    token_slices: int,
    extended: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What csrc/kernels/low_rank_gradients_sm80.cu computes."""
    assert token_slices >= 1
    u = (scaling * (grad_y.float() @ lora_b.to(grad_y.dtype).float())).to(grad_y.dtype)
    grad_b = (scaling * (grad_y.float().t() @ xa.float())).to(lora_b.dtype)
    if extended is not None:
        qlora_entry.write_extended(grad_y, u, extended)
    return u, grad_b


def token_product(
    data: torch.Tensor,
    left: torch.Tensor,
    scaling: float,
    token_slices: int,
    dtype: torch.dtype,
    rank_major: bool,
) -> torch.Tensor:
    """What csrc/kernels/low_rank_gradients_sm80.cu computes."""
    assert token_slices >= 1
    product = (scaling * (data.float().t() @ left.float())).to(dtype)
    return product.t().contiguous() if rank_major else product


def column_product(
    x: torch.Tensor, adapter: torch.Tensor, token_slices: int, extended: torch.Tensor
) -> torch.Tensor:
    """What csrc/kernels/low_rank_gradients_sm80.cu computes."""
    assert token_slices >= 1
    xa = (x.float() @ adapter.to(x.dtype).float().t()).to(x.dtype)
    qlora_entry.write_extended(x, xa, extended)
    return xa


def test_scales_in_odd_groups_are_decoded_for_the_fused_kernel() -> None:
    weight = random_weight((24, 128), 64, "nested")
    assert matmul_entry.for_fused_matmul(weight).scale_codes is not None
    assert weight.scale_codes is not None
    groups = torch.rand(-(-weight.scale_codes.numel() // 7)) + 0.1
    odd = weight._replace(scale_absmax=groups, scale_block_size=7)
    decoded = matmul_entry.for_fused_matmul(odd)
    assert decoded.absmax is not None
    assert decoded[2:5] == (None, None, None)
    expected = dequantize_reference(odd, odd.shape, torch.float32)
    assert_bitwise_equal(dequantize_reference(decoded, odd.shape, torch.float32), expected)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries with plain torch in place of the kernels that they launch."""
    for module in (matmul_entry, qlora_entry):
        monkeypatch.setattr(module, "dequantize_cuda", dequantize_reference)
    monkeypatch.setattr(qlora_entry, "dropout_cuda", dropout_reference)
    monkeypatch.setattr(low_rank, "run_adapter_gradients", adapter_gradients)
    monkeypatch.setattr(low_rank, "run_token_product", token_product)
    monkeypatch.setattr(low_rank, "run_column_product", column_product)


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
    adapters = ((5, torch.float32, None), (16, dtype, dtype), (80, torch.float32, None))
    for i, (rank, adapter_dtype, bias_dtype) in enumerate(adapters):
        weight = random_weight((96 + i, 200), 64)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_nobody_needs_are_empty(dtype: torch.dtype) -> None:
    p = random_qlora(70, random_weight((96, 200), 64), 4, dtype, torch.float32)
    xa = p.x @ p.lora_a.t().to(dtype)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        gradients = qlora_entry.qlora_linear_backward_cuda(
            p.grad_y, p.x, xa, p.weight, p.lora_a, p.lora_b, p.scaling, needs=needs
        )
        assert [g.numel() > 0 for g in gradients] == list(needs)


def test_gradients_take_the_way_that_moves_fewer_bytes() -> None:
    bf16 = torch.bfloat16
    one_pass = GradientSizes(8192, 4096, 16, bf16, bf16, with_u=True)
    alone = one_pass._replace(with_u=False)
    for facts in (A100, H200):
        assert choose_gradient_path(one_pass, facts.sm_count) == "kernel"
        assert gradient_costs(one_pass, facts.sm_count).kernel < 1.3
        # One product reads its data once either way, and a GEMM leaves no partial sums.
        assert choose_gradient_path(alone, facts.sm_count) == "gemm"
        assert choose_gradient_path(one_pass._replace(rank=128), facts.sm_count) == "gemm"
        # A GEMM would round fp32 gradients to bf16.
        for sizes in (one_pass, alone, one_pass._replace(rank=256)):
            fp32 = sizes._replace(adapter_dtype=torch.float32)
            assert choose_gradient_path(fp32, facts.sm_count) == "kernel"
        assert projects_while_copying(one_pass)
        assert not projects_while_copying(one_pass._replace(rank=128))
        assert not projects_while_copying(one_pass._replace(dtype=torch.float32))
    for declined in ({"dtype": torch.float32}, {"tokens": 0}, {"tokens": 2**28}):
        sizes = one_pass._replace(adapter_dtype=torch.float32, **declined)
        assert choose_gradient_path(sizes, 132) == "gemm"
    assert describe(one_pass, 132) == (
        "{u, grad_b} M=8192 C=4096 R=16, bfloat16 over bfloat16: kernel"
        " (kernel 1.20, gemm 2.00 passes, 16 token slices)"
    )
    assert "gemm (dtype must be float16 or bfloat16" in describe(
        one_pass._replace(dtype=torch.float32), 132
    )


def test_token_slices_fill_the_gpu_and_keep_their_sums_short() -> None:
    for facts in (A100, H200):
        for tokens in (1, 64, 130, 2048, 8192, 100_000):
            for cols, rank in ((64, 1), (1024, 16), (4096, 33), (28_672, 256)):
                sizes = GradientSizes(
                    tokens, cols, rank, torch.bfloat16, torch.float32, with_u=True
                )
                slices = choose_token_slices(sizes, facts.sm_count)
                assert 1 <= slices <= max(1, tokens // 16)
                assert tokens / slices <= 2048
    assert (
        choose_token_slices(GradientSizes(8192, 4096, 16, *[torch.bfloat16] * 2, True), 132) == 16
    )


def test_many_weights_reach_the_kernel_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every shape together; a transposed out alone, through a temporary."""
    calls, single = [], []

    def many(*arguments: object) -> None:
        *fields, outs, stream = arguments
        assert stream == 7
        calls.append(len(outs))
        codes, absmax, codebook = fields[0], fields[1], fields[5]
        rows, cols, block_size, scale_block_size = fields[7:]
        for i, out in enumerate(outs):
            nested = [fields[j][i] for j in (2, 3, 4)]
            weight = WeightOperands(
                codes[i],
                absmax[i],
                *nested,
                codebook[i],
                fields[6][i],
                (rows[i], cols[i]),
                block_size[i],
                scale_block_size[i],
            )
            out.copy_(dequantize_reference(weight, weight.shape, out.dtype))

    def one(weight: WeightOperands, shape: tuple[int, ...], dtype: torch.dtype, out: torch.Tensor):
        single.append(shape)
        return out.copy_(dequantize_reference(weight, shape, dtype))

    ops = types.SimpleNamespace(dequantize_many=types.SimpleNamespace(default=many))
    monkeypatch.setattr(torch.ops, "qlora_kernels_cuda", ops)
    monkeypatch.setattr(dequantize_entry, "current_stream", lambda tensor: 7)
    monkeypatch.setattr(dequantize_entry, "dequantize_cuda", one)
    shapes = ((6, 64), (3, 50), (0, 4), (9, 7), (1, 32), (8, 16))
    weights = [
        random_weight(shape, 32, ("absmax", "nested")[i % 2]) for i, shape in enumerate(shapes)
    ]
    pitched, transposed = torch.zeros(3, 60)[:, :50], torch.zeros(7, 9).t()
    outs = [None, pitched, None, transposed, None, torch.zeros(8, 16)]
    dense = dequantize_entry.dequantize_many_cuda(weights, torch.float32, outs)
    assert calls == [5]
    assert single == [(9, 7)]
    assert dense[1] is pitched
    assert dense[3] is transposed
    for got, weight in zip(dense, weights, strict=True):
        expected = dequantize_reference(weight, weight.shape, torch.float32)
        assert_bitwise_equal(got.contiguous(), expected)
    assert dequantize_entry.dequantize_many_cuda([], torch.float32, []) == []
