"""The kernels behind the torch ops: chosen by the registry, traced without a break, differentiable,
and passed over with a reason."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.backends import registry
from qlora_kernels.backends.registry import OPS, Problem, entries, select
from qlora_kernels.errors import BackendError
from qlora_kernels.ops.qlora_group import member_fields
from qlora_kernels.reference.qlora_group import GroupMember
from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal

BF16 = torch.bfloat16


def triton_entry(op: str) -> registry.KernelEntry:
    return next(entry for entry in entries(op) if entry.backend == "triton")


def test_every_op_has_a_triton_kernel() -> None:
    for op in OPS:
        assert triton_entry(op).available() is None


def test_the_registry_picks_them_and_says_why_it_does_not() -> None:
    matmul = Problem("quantized_matmul", "cpu", BF16, 4, 64, 96, block_size=64)
    assert select(matmul).backend == "triton"
    assert triton_entry("quantized_matmul").rejects(matmul) is None
    for problem, reason in (
        (matmul._replace(dtype=torch.float64), "dtype must be one of float32, float16, bfloat16"),
        (matmul._replace(device_type="cuda"), "device must be cpu, got cuda"),
        (matmul._replace(batch_invariant=True), "in_features must be a multiple of 64, got 96"),
    ):
        assert reason in (triton_entry("quantized_matmul").rejects(problem) or "")
        assert problem.device_type == "cuda" or select(problem).backend != "triton"
        with qlk.backend("triton"), pytest.raises(BackendError, match="the forced backend"):
            select(problem)


def test_opcheck() -> None:
    torch.manual_seed(0)
    with qlk.backend("triton"):
        weight = torch.randn(24, 64)
        qw = qlk.quantize(weight, block_size=32)
        operands = qw.operands()
        x, lora_a, lora_b = torch.randn(5, 64), torch.randn(4, 64), torch.randn(24, 4)
        ops = torch.ops.qlora_kernels
        seed = torch.tensor([3])
        encoder = qw.format.codebook.encoder
        quantize = (
            weight,
            torch.tensor(encoder.boundaries),
            torch.tensor(encoder.rank_codes, dtype=torch.uint8),
            encoder.zero_code,
            32,
        )
        fields = [[one, one] for one in operands]
        fields[7] = [24 * 64] * 2
        many = (*fields, BF16)
        y, xa = ops.qlora_linear(x, *operands, lora_a, lora_b, 0.5, None, 0.1, seed, False)
        pair = [
            GroupMember(operands, lora_a, lora_b, 0.5, None, 0.0, None),
            GroupMember(operands, lora_a, lora_b, 0.5, None, 0.1, seed),
        ]
        group = member_fields(pair)
        *_, group_xa = ops.qlora_group(x, *group)
        samples = {
            "quantize": quantize,
            "double_quantize": (torch.rand(300), operands.scale_codebook, 256),
            "dequantize": (*operands, BF16),
            "dequantize_many": many,
            "quantized_matmul": (x, *operands),
            "quantized_matmul_backward_input": (y, *operands),
            "qlora_linear": (x, *operands, lora_a, lora_b, 0.5, None, 0.1, seed, False),
            "qlora_linear_backward": (
                *(y, x, xa, *operands, lora_a, lora_b, 0.5, 0.1, seed, [True, True, True]),
            ),
            "qlora_group": (x, *group),
            "qlora_group_backward": (x, [y, None], group_xa, *group, [True] * 5),
            "dropout": (x, 0.5, seed),
        }
        assert set(samples) == set(OPS)
        for op, arguments in samples.items():
            torch.library.opcheck(getattr(ops, op).default, arguments)


def test_fullgraph_and_gradients() -> None:
    torch.manual_seed(1)
    qw = qlk.quantize(torch.randn(40, 128), block_size=64)
    x = torch.randn(6, 128, dtype=BF16, requires_grad=True)
    lora_a = torch.randn(4, 128, requires_grad=True)
    lora_b = torch.randn(40, 4, requires_grad=True)

    def layer(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return qlk.qlora_linear(x, qw, a, b, 0.5)

    results = []
    for backend, compiled in (("triton", False), ("triton", True), ("reference", False)):
        torch.compiler.reset()
        function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        with qlk.backend(backend):
            y = function(x, lora_a, lora_b)
            gradients = torch.autograd.grad(y.float().square().sum(), (x, lora_a, lora_b))
        results.append((y, *gradients))
    for eager, traced, reference in zip(*results, strict=True):
        assert_bitwise_equal(traced, eager)
        # Two computations of the same numbers that round at other places.
        difference = (eager.double() - reference.double()).norm() / reference.double().norm()
        assert difference < 2 * torch.finfo(BF16).eps


def test_public_codecs_take_any_shape() -> None:
    torch.manual_seed(2)
    weight = torch.randn(3, 50, 7).half()
    results = []
    for backend in ("triton", "reference"):
        with qlk.backend(backend):
            qw = qlk.quantize(weight, "fp4", 32, True)
            results.append((*qw.tensors().values(), qlk.dequantize(qw)))
    for ours, reference in zip(*results, strict=True):
        assert_bitwise_equal(ours, reference)


def test_fp32_products_are_as_accurate_as_torchs() -> None:
    torch.manual_seed(3)
    qw = qlk.quantize(torch.randn(70, 256), double_quant=False)
    dense = qlk.dequantize(qw, torch.float32)
    x = torch.randn(9, 256)
    with qlk.backend("triton"):
        for invariant in (False, True):
            y = qlk.quantized_linear(x, qw, batch_invariant=invariant)
            assert_as_accurate(y, x.double() @ dense.double().T, x @ dense.T)
