"""The Triton kernels where only a GPU can show it: real layers, many random problems, CUDA graphs,
more than 2^31 elements, memory checked by compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qlora_kernels.backends.triton.dequantize import dequantize_triton
from qlora_kernels.backends.triton.quantize import quantize_triton
from qlora_kernels.backends.triton.quantized_matmul import (
    quantized_matmul_backward_input_triton,
    quantized_matmul_triton,
)
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import dequantize_reference, quantize_reference
from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal
from tests.problems import random_weight
from tests.triton.checks import (
    CODEBOOKS,
    backward,
    check_qlora,
    check_repeats,
    encoder_arguments,
    forward,
    operands_on,
    qlora_on,
    random_problem,
)

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16
# [N, K] of the attention and MLP layers of Llama 7B, 13B, 65B and 70B.
LAYERS = {
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "13B": ((5120, 5120), (13824, 5120), (5120, 13824)),
    "65B": ((8192, 8192), (22016, 8192), (8192, 22016)),
    "70B": ((1024, 8192), (28672, 8192), (8192, 28672)),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("model", LAYERS)
def test_real_layers(device: torch.device, model: str, dtype: torch.dtype) -> None:
    for shape in LAYERS[model]:
        weight = operands_on(device, random_weight(shape, 64, "nested"))
        exact = dequantize_triton(weight, shape, torch.float32).double()
        rounded = exact.to(dtype)
        generator = torch.Generator(device).manual_seed(0)
        for tokens in (1, 16, 64, 256, 512, 2048):
            x = torch.randn(tokens, shape[1], device=device, generator=generator).to(dtype)
            y = quantized_matmul_triton(x, weight)
            assert_as_accurate(y, x.double() @ exact.T, F.linear(x, rounded))
            grad_y = torch.randn(tokens, shape[0], device=device, generator=generator).to(dtype)
            grad_x = quantized_matmul_backward_input_triton(grad_y, weight)
            assert_as_accurate(grad_x, grad_y.double() @ exact, grad_y @ rounded)


@pytest.mark.parametrize("tokens", [1, 16, 200, 2048])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_a_real_layer_with_its_adapter(
    device: torch.device, dtype: torch.dtype, tokens: int
) -> None:
    for dropout_p in (0.0, 0.05):
        cpu = torch.device("cpu")
        weight = random_weight((4096, 4096), 64, "nested")
        problem = qlora_on(cpu, tokens, weight, 16, dtype, torch.float32, dropout_p=dropout_p)
        check_qlora(device, problem)
        check_repeats(device, problem)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_ten_thousand_random_problems(device: torch.device) -> None:
    for seed in range(10_000):
        try:
            check_qlora(device, random_problem(seed))
        except AssertionError as error:
            raise AssertionError(f"random_problem({seed}): {error}") from error


@pytest.mark.parametrize("tokens", [1, 16, 200, 2048])
def test_a_cuda_graph_replays_with_new_inputs(device: torch.device, tokens: int) -> None:
    weight = random_weight((1024, 2048), 64, "nested")
    p = qlora_on(device, tokens, weight, 16, BF16, torch.float32, dropout_p=0.1)
    first = (*forward(p), *backward(p, forward(p)[1]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backward(p, forward(p)[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, xa = forward(p)
        captured = (y, xa, *backward(p, xa))
    graph.replay()
    for replayed, eager in zip(captured, first, strict=True):
        assert_bitwise_equal(replayed, eager)
    other = qlora_on(device, tokens, weight, 16, BF16, torch.float32, dropout_p=0.1, seed=1)
    for mine, new in ((p.x, other.x), (p.grad_y, other.grad_y), (p.seed, other.seed)):
        assert mine is not None and new is not None
        mine.copy_(new)
    graph.replay()
    y, xa = forward(p)
    for replayed, eager in zip(captured, (y, xa, *backward(p, xa)), strict=True):
        assert_bitwise_equal(replayed, eager)


def test_side_streams_do_not_disturb_each_other(device: torch.device) -> None:
    """Scratch comes from torch's allocator, which keeps the streams' blocks apart."""
    cases = [
        qlora_on(device, tokens, random_weight((1024, 2048), 64, "nested", seed=seed), 16, BF16)
        for seed, tokens in enumerate((1, 16, 300, 2048))
    ]
    alone = [(*forward(p), *backward(p, forward(p)[1])) for p in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, p in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                y, xa = forward(p)
                results.append((y, xa, *backward(p, xa)))
        torch.cuda.synchronize()
        for got, wanted in zip(results, alone, strict=True):
            for one, other in zip(got, wanted, strict=True):
                assert_bitwise_equal(one, other)


def test_a_kernel_runs_on_the_tensors_device(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1 - (device.index or 0))
    p = qlora_on(other, 16, random_weight((256, 512), 64, "nested"), 16, BF16)
    y, xa = forward(p)
    here = [one.to(device) for one in forward(qlora_on(device, 16, p.weight, 16, BF16))]
    for there, wanted in zip((y, xa), here, strict=True):
        assert_bitwise_equal(there.to(device), wanted)


def test_batch_invariant_rows(device: torch.device) -> None:
    p = qlora_on(device, 300, random_weight((1000, 2048), 64, "nested"), 16, BF16)
    y, xa = forward(p, invariant=True)
    for begin, end in ((0, 1), (299, 300), (3, 6), (60, 130), (0, 257)):
        part_y, part_xa = forward(p.with_x(p.x[begin:end].clone()), invariant=True)
        assert_bitwise_equal(part_y, y[begin:end])
        assert_bitwise_equal(part_xa, xa[begin:end])


def test_more_than_2_to_the_31_elements(device: torch.device) -> None:
    numel, block_size = 2**31 + 4096 + 64, 64
    if torch.cuda.get_device_properties(device).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    weight = torch.randn(numel // 1024, device=device, dtype=BF16).repeat_interleave(1024)
    weight = torch.cat([weight, weight.new_full((numel - weight.numel(),), 0.5)])
    boundaries, rank_codes, zero_code = encoder_arguments(CODEBOOKS["nf4"])
    arguments = (boundaries.to(device), rank_codes.to(device), zero_code, block_size)
    weight[-4160:] = torch.randn(4160, device=device).to(BF16)
    codes, absmax = quantize_triton(weight, *arguments)
    tail = weight[-4160:].cpu()
    expected = quantize_reference(tail, boundaries, rank_codes, zero_code, block_size)
    assert_bitwise_equal(codes[-2080:].cpu(), expected[0])
    assert_bitwise_equal(absmax[-65:].cpu(), expected[1])
    del weight
    table = CODEBOOKS["nf4"].table(device)
    operands = WeightOperands(
        codes, absmax, None, None, None, table, None, (numel,), block_size, 256
    )
    dense = dequantize_triton(operands, (numel,), BF16)
    last = operands._replace(codes=codes[-2080:], absmax=absmax[-65:], shape=(4160,))
    wanted = dequantize_reference(operands_on(torch.device("cpu"), last), (4160,), BF16)
    assert_bitwise_equal(dense[-4160:].cpu(), wanted)


def test_a_product_with_more_than_2_to_the_31_weights(device: torch.device) -> None:
    if torch.cuda.get_device_properties(device).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    rows, cols = 2**20 + 64, 2048
    codes = torch.randint(0, 256, (rows * cols // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(rows * cols // 64, device=device)
    table = CODEBOOKS["nf4"].table(device)
    weight = WeightOperands(codes, absmax, None, None, None, table, None, (rows, cols), 64, 256)
    last = weight._replace(
        codes=codes[-64 * cols // 2 :], absmax=absmax[-64 * cols // 64 :], shape=(64, cols)
    )
    for tokens in (1, 16, 600):
        x = torch.randn(tokens, cols, device=device).to(BF16)
        y = quantized_matmul_triton(x, weight)[:, -64:]
        exact = dequantize_triton(last, (64, cols), torch.float32).double()
        assert_as_accurate(y, x.double() @ exact.T, x @ exact.to(BF16).T)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(device: torch.device, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on this machine")
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["tests/gpu/test_triton_shared.py", "-k", "ragged or splits or apart or nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
