"""On hardware: the CUDA backend through the torch ops, against the reference on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels import reference
from qlora_kernels.autograd import qlora_linear, quantized_linear
from qlora_kernels.backends import entries
from qlora_kernels.backends.cuda.dequantize import dequantize_cuda
from qlora_kernels.backends.cuda.low_rank import plan_projection, run_projection
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import dequantize_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.problems import DTYPES, SCALES, QLoRAProblem, random_qlora, random_weight
from tests.tolerances import (
    assert_matmul,
    assert_matmul_backward,
    assert_qlora,
    assert_qlora_backward,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
TOKENS = (0, 1, 2, 7, 8, 9, 16, 17, 32, 33, 100, 128, 129, 200, 512, 513)


def entry(op: str):
    """The CUDA backend's kernel of an op; it must be able to run here."""
    found = next(e for e in entries(op) if e.backend == "cuda:sm80")
    assert found.available() is None, found.available()
    return found.fn


def on_gpu(value):
    """A tensor, or a tuple or dataclass of tensors, on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, WeightOperands):
        return WeightOperands(*(on_gpu(v) for v in value))
    if dataclasses.is_dataclass(value):
        fields = {f.name: on_gpu(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantize_and_back_equal_the_cpu(dtype: torch.dtype, double_quant: bool) -> None:
    weight = torch.randn(1111, 333, generator=torch.Generator().manual_seed(0)).to(dtype)
    with qlk.backend("reference"):
        expected = qlk.quantize(weight, double_quant=double_quant)
    with qlk.backend("cuda:sm80"):
        got = qlk.quantize(weight.cuda(), double_quant=double_quant)
        dense = qlk.dequantize(got)
    for field in ("codes", "absmax", "scale_codes", "scale_absmax", "scale_offset"):
        mine, theirs = getattr(got, field), getattr(expected, field)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_bitwise_equal(mine.cpu(), theirs, field)
    with qlk.backend("reference"):
        assert_bitwise_equal(dense.cpu(), qlk.dequantize(expected))


def test_quantize_against_decoded_scales_equals_the_cpu() -> None:
    fmt = dataclasses.replace(qlk.get_format("nf4"), name="against", encode_against="decoded")
    weight = torch.randn(500, 77, generator=torch.Generator().manual_seed(1))
    with qlk.backend("reference"):
        expected = qlk.quantize(weight, format=fmt)
    with qlk.backend("cuda:sm80"):
        got = qlk.quantize(weight.cuda(), format=fmt)
    assert_bitwise_equal(got.codes.cpu(), expected.codes)


def test_dequantize_beyond_2_31_elements() -> None:
    rows, cols = 66_000, 32_768
    if torch.cuda.mem_get_info()[0] < 3 * rows * cols:
        pytest.skip("needs 7 GB of free GPU memory")
    weight = random_weight((64, cols), 64, seed=2)
    codes = weight.codes.repeat(rows // 64 + 1)[: rows * cols // 2]
    assert weight.absmax is not None
    absmax = weight.absmax.repeat(rows // 64 + 1)[: rows * cols // 64]
    large = on_gpu(weight._replace(codes=codes, absmax=absmax, shape=(rows, cols)))
    dense = dequantize_cuda(large, large.shape, torch.bfloat16)
    expected = dequantize_reference(weight, weight.shape, torch.bfloat16)
    last = (rows - 1) // 64 * 64
    assert_bitwise_equal(dense[:64].cpu(), expected)
    assert_bitwise_equal(dense[last:].cpu(), expected[: rows - last])


def test_dequantize_many_equals_the_cpu() -> None:
    """More weights than a launch takes, all kinds together, some into given rows."""
    shapes = [(64, 96), (33, 129), (1, 1), (0, 5), (128, 200), (7, 4096)] * 4
    weights = [
        random_weight(shape, (32, 64, 256)[i % 3], SCALES[i % 2], ("nf4", "fp4")[i % 2], seed=i)
        for i, shape in enumerate(shapes)
    ]
    for dtype in DTYPES:
        buffer = torch.zeros(300, 300, dtype=dtype, device="cuda")
        outs = [None] * len(weights)
        outs[1], outs[4] = buffer[:33, :129], buffer[50:178, 8:208]
        dense = entry("dequantize_many")([on_gpu(w) for w in weights], dtype, outs)
        for got, weight in zip(dense, weights, strict=True):
            expected = dequantize_reference(weight, weight.shape, dtype)
            assert_bitwise_equal(got.cpu().contiguous(), expected)


@pytest.mark.parametrize("layout", ["pitched", "transposed", "shifted"])
def test_dequantize_into_any_layout(layout: str) -> None:
    weight = random_weight((33, 200), 64, "nested", seed=3)
    buffer = torch.full((300, 300), torch.nan, dtype=torch.bfloat16, device="cuda")
    out = buffer[:33, :200]
    if layout == "transposed":
        out = buffer[:200, :33].t()
    elif layout == "shifted":
        out = buffer[1:34, 3:203]
    dequantize_cuda(on_gpu(weight), weight.shape, torch.bfloat16, out)
    assert_bitwise_equal(
        out.cpu().contiguous(), dequantize_reference(weight, weight.shape, torch.bfloat16)
    )
    assert int(buffer.isfinite().sum()) == weight.shape[0] * weight.shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_matmul(tokens: int, scales: str, dtype: torch.dtype) -> None:
    for shape, block_size in (((640, 1024), 64), ((130, 192), 128), ((65, 257), 32)):
        weight = random_weight(shape, block_size, scales, seed=tokens)
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        grad_y = torch.randn(tokens, shape[0], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator)
        weight_gpu = on_gpu(weight)
        y = entry("quantized_matmul")(x.cuda(), weight_gpu, bias.cuda()).cpu()
        assert_matmul(y, x, weight, bias)
        grad_x = entry("quantized_matmul_backward_input")(grad_y.cuda(), weight_gpu).cpu()
        assert_matmul_backward(grad_x, grad_y, weight)


def run_qlora(problem: QLoRAProblem):
    """Forward and backward on the GPU; results on the CPU."""
    p = on_gpu(problem)
    y, xa = entry("qlora_linear")(
        p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, p.dropout_p, p.seed
    )
    gradients = entry("qlora_linear_backward")(
        p.grad_y, p.x, xa, p.weight, p.lora_a, p.lora_b, p.scaling, p.dropout_p, p.seed
    )
    return y.cpu(), xa.cpu(), tuple(g.cpu() for g in gradients)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS[1:])
def test_qlora_linear(tokens: int, dtype: torch.dtype, dropout_p: float) -> None:
    for rank, adapter_dtype in ((16, torch.float32), (5, dtype)):
        weight = random_weight((640, 512), 64, "nested", seed=rank)
        problem = random_qlora(
            tokens, weight, rank, dtype, adapter_dtype, bias_dtype=dtype, dropout_p=dropout_p
        )
        y, xa, gradients = run_qlora(problem)
        assert_qlora(y, xa, problem)
        assert_qlora_backward(gradients, problem)


def test_down_projection_of_more_tokens_than_a_grid_has_in_its_second_dimension() -> None:
    x = torch.ones(8 * 65_536 + 3, 1, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3.0
    got = run_projection(plan_projection(x, torch.full((1, 1), 0.5, device="cuda")))
    assert float(got[-1]) == 1.5
    assert bool((got[:-1] == 0.5).all())


def test_dropout_equals_the_reference() -> None:
    x = torch.randn(1001, 33, generator=torch.Generator().manual_seed(4))
    seed = torch.tensor([-(2**62) + 5], dtype=torch.int64)
    got = entry("dropout")(x.cuda(), 0.3, seed.cuda()).cpu()
    assert_bitwise_equal(got, reference.dropout_reference(x, 0.3, seed))


def test_results_repeat_bit_for_bit() -> None:
    weight = random_weight((4096, 4096), 64, seed=5)
    for tokens in (1, 16, 48, 300):
        problem = random_qlora(tokens, weight, 16, torch.bfloat16, torch.float32)
        first, second = run_qlora(problem), run_qlora(problem)
        assert_bitwise_equal(first[0], second[0])
        for mine, theirs in zip(first[2], second[2], strict=True):
            assert_bitwise_equal(mine, theirs)


def test_hopper_matmul_beyond_2_31_elements() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's kernel")
    rows, cols = 66_000, 32_768
    if torch.cuda.mem_get_info()[0] < 3 * rows * cols:
        pytest.skip("needs 7 GB of free GPU memory")
    weight = random_weight((64, cols), 64, seed=2)
    assert weight.absmax is not None
    repeats = rows // 64 + 1
    large = weight._replace(
        codes=weight.codes.repeat(repeats)[: rows * cols // 2],
        absmax=weight.absmax.repeat(repeats)[: rows * cols // 64],
        shape=(rows, cols),
    )
    x = torch.randn(40, cols, generator=torch.Generator().manual_seed(3)).bfloat16()
    y = entry("quantized_matmul")(x.cuda(), on_gpu(large)).cpu()
    assert_matmul(y[:, :64].contiguous(), x, weight)
    assert_matmul(y[:, rows // 64 * 64 - 64 : rows // 64 * 64].contiguous(), x, weight)


def test_batch_invariant_rows_do_not_depend_on_the_batch() -> None:
    weight = on_gpu(random_weight((1000, 2048), 64, "nested", seed=6))
    x = torch.randn(150, 2048, generator=torch.Generator().manual_seed(6)).bfloat16().cuda()
    matmul = entry("quantized_matmul")
    whole = matmul(x, weight, None, True)
    for tokens in (1, 8, 17, 64, 65):
        assert_bitwise_equal(matmul(x[:tokens], weight, None, True), whole[:tokens])


def test_a_graph_replays() -> None:
    weight = random_weight((1024, 1024), 64, "nested", seed=7)
    problem = random_qlora(4, weight, 16, torch.bfloat16, torch.float32)
    p = on_gpu(problem)
    arguments = (p.weight, p.lora_a, p.lora_b, p.scaling)
    run = entry("qlora_linear")
    eager, _ = run(p.x, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = run(p.x, *arguments)
    for _ in range(3):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise_equal(y, eager)


def test_public_functions_run_on_another_stream() -> None:
    qw = qlk.quantize(torch.randn(512, 512, device="cuda"))
    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lora_a = torch.randn(8, 512, device="cuda", requires_grad=True)
    lora_b = torch.randn(512, 8, device="cuda", requires_grad=True)
    with qlk.backend("cuda:sm80"):
        expected = qlora_linear(x, qw, lora_a, lora_b, 0.5)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got = qlora_linear(x, qw, lora_a, lora_b, 0.5)
            plain = quantized_linear(x, qw)
            (got.sum() + plain.sum()).backward()
        stream.synchronize()
    assert_bitwise_equal(got, expected)
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, lora_a, lora_b))
