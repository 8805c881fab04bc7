"""Without a GPU: the CUDA entries say why they decline, choose their path by sizes alone, and put
their GEMMs together rightly (here on CPU tensors, with the reference's dequantize)."""

from __future__ import annotations

import types

import pytest
import torch

from qlora_kernels.backends.cuda import dequantize as dequantize_entry
from qlora_kernels.backends.cuda import low_rank, wgmma
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
    WGMMA_TOKENS,
    MatmulSizes,
    choose_path,
    choose_splits,
    matmul_rejects,
    why_not_wgmma,
)
from qlora_kernels.backends.cuda.wgmma import (
    TILES,
    WgmmaTile,
    choose_wgmma_tile,
    estimated_clocks,
    scratch_sizes,
    work_steps,
)
from qlora_kernels.backends.device import A100, H200
from qlora_kernels.backends.registry import OPS, Problem, entries
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import dequantize_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.backends.cuda_on_cpu import install
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


def test_hopper_takes_its_own_kernel_for_tens_to_hundreds_of_tokens() -> None:
    sizes = MatmulSizes(17, 512, 512, torch.bfloat16, 64, capability=H200.capability)
    for tokens, path in ((16, "fused"), (17, "wgmma"), (WGMMA_TOKENS, "wgmma"), (513, "dense")):
        assert choose_path(sizes._replace(tokens=tokens)) == path
    assert choose_path(sizes._replace(batch_invariant=True)) == "fused"
    assert choose_path(sizes._replace(block_size=32)) == "dense"
    for capability in (80, 89, 100, 120):
        assert choose_path(sizes._replace(capability=capability)) == "fused"
    assert "sm_90, got sm_80" in (why_not_wgmma(sizes._replace(capability=80)) or "")
    assert "17 ... 512, got 513" in (why_not_wgmma(sizes._replace(tokens=513)) or "")
    assert "batch_invariant" in (why_not_wgmma(sizes._replace(batch_invariant=True)) or "")


def test_hopper_tiles_cover_the_gpu_and_lose_little() -> None:
    for tokens in (17, 33, 64, 100, 129, 256, 512):
        for rows, cols in ((4096, 4096), (14_336, 4096), (28_672, 8192), (130, 64), (1, 2048)):
            tile = choose_wgmma_tile(tokens, rows, cols, H200.sm_count)
            steps = work_steps(tokens, rows, cols, tile[:2])
            assert tile[:2] in TILES
            assert 1 <= tile.blocks <= min(steps, H200.sm_count)
            clocks = estimated_clocks(tokens, rows, cols, tile[:2], tile.blocks)
            whole = estimated_clocks(tokens, rows, cols, (128, 32), 1)
            assert clocks <= whole
    assert choose_wgmma_tile(512, 28_672, 8192, H200.sm_count) == (256, 128, 132)
    assert choose_wgmma_tile(32, 4096, 4096, H200.sm_count) == (128, 32, 132)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tokens", [20, 70])
def test_hopper_matmul_gets_its_operands_and_scratch(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    p = random_qlora(tokens, random_weight((96, 192), 64), 5, torch.bfloat16, torch.float32)
    tile = WgmmaTile(256, 32, 2)

    def launch(x: torch.Tensor, *rest: object) -> None:
        *weight, bias, xa, lora_b, scaling, y = rest[:16]
        rows, columns, blocks, arranged, partials, counters, stream = rest[16:]
        assert (rows, columns, blocks, stream) == (*tile, 7)
        assert weight[7:] == [96, 192, 64, p.weight.scale_block_size]
        needed = scratch_sizes(tokens, 96, 192, 5, tile)
        assert (arranged.numel(), partials.numel()) == needed[:2]
        assert counters.numel() >= needed.tickets and not counters.any()
        exact = x.float() @ dequantize_reference(p.weight, (96, 192), torch.float32).t()
        y.copy_(exact + scaling * (xa.float() @ lora_b.to(x.dtype).float().t()))
        assert bias is None

    def project(x: torch.Tensor, adapter: torch.Tensor, result: torch.Tensor, _: int) -> None:
        result.copy_(x.float() @ adapter.to(x.dtype).float().t())

    named = {"wgmma_matmul": launch, "down_projection": project}
    ops = {name: types.SimpleNamespace(default=function) for name, function in named.items()}
    monkeypatch.setattr(torch.ops, "qlora_kernels_cuda", types.SimpleNamespace(**ops))
    for module in (wgmma, low_rank):
        monkeypatch.setattr(module, "current_stream", lambda tensor: 7)
    monkeypatch.setattr(matmul_entry, "choose_wgmma_tile", lambda *sizes: tile)
    first = low_rank.plan_projection(p.x, p.lora_a)
    y = matmul_entry.fused_matmul(
        p.x, p.weight, None, first.result, p.lora_b, p.scaling, first, "wgmma"
    )
    assert_qlora(y, first.result, p)


def test_splits_fill_the_gpu_and_keep_their_blocks_long() -> None:
    for facts in (A100, H200):
        for rows, cols in ((4096, 4096), (14_336, 4096), (8192, 28_672), (128, 64), (1, 8192)):
            splits = choose_splits(rows, cols, facts.sm_count)
            assert 1 <= splits <= 16
            assert splits == 1 or cols // splits >= 512
            assert -(-rows // 128) * splits <= max(2 * facts.sm_count, -(-rows // 128))
    assert choose_splits(4096, 4096, H200.sm_count) == 8


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
    install(monkeypatch)


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
        # Up to 64 ranks take one pass, and then more partial sums than the data is worth.
        assert choose_gradient_path(one_pass._replace(rank=64), facts.sm_count) == "kernel"
        few = one_pass._replace(rank=64, tokens=2048)
        assert choose_gradient_path(few, facts.sm_count) == "gemm"
        assert choose_gradient_path(one_pass._replace(rank=128), facts.sm_count) == "gemm"
        # A GEMM would round fp32 gradients to bf16.
        for sizes in (one_pass, alone, one_pass._replace(rank=256)):
            fp32 = sizes._replace(adapter_dtype=torch.float32)
            assert choose_gradient_path(fp32, facts.sm_count) == "kernel"
        project = one_pass._replace(with_gradient=False)
        for rank in (1, 16, 48, 64):
            assert projects_while_copying(project._replace(rank=rank))
        assert not projects_while_copying(project._replace(rank=128))
        assert not projects_while_copying(project._replace(dtype=torch.float32))
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
