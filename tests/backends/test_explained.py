"""`explain` names the path inside the chosen backend: the one that its entry takes, on the CPU seen
by what it calls, for GPUs on the facts of some."""

from __future__ import annotations

import dataclasses
import types
from collections import Counter

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.backends import launch_config, library, registry
from qlora_kernels.backends.cpu import quantized_matmul as cpu_entry
from qlora_kernels.backends.cpu.common import ISA_NAMES, machine_isa
from qlora_kernels.backends.cpu.explained import matmul_path as cpu_path
from qlora_kernels.backends.cuda import explained as cuda_explained
from qlora_kernels.backends.cuda import matmul_path as cuda_choice
from qlora_kernels.backends.cuda.explained import describe_backward, describe_forward
from qlora_kernels.backends.device import A100, B200, H200, DeviceFacts
from qlora_kernels.backends.registry import Problem, entries, explain_problem
from qlora_kernels.backends.triton import explained as triton_explained
from tests.problems import DTYPES, random_weight

FACTS = (A100, H200, B200)
BF16 = torch.bfloat16
TOKENS = (0, 1, 2, 4, 5, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 40, 41, 128, 129, 512, 513, 4096)


def problem(op: str = "qlora_linear", tokens: int = 4, **changes: object) -> Problem:
    sizes = {"out_features": 4096, "in_features": 4096, "rank": 16}
    return Problem(op, "cuda", BF16, tokens, **sizes)._replace(**changes)


def problems(backward: bool) -> list[Problem]:
    """Both ops of a direction in every size that a path begins or ends at."""
    ops = (
        ("quantized_matmul_backward_input", "qlora_linear_backward")
        if backward
        else ("quantized_matmul", "qlora_linear")
    )
    changes = ({}, {"in_features": 4104}, {"block_size": 32}, {"batch_invariant": True})
    return [
        problem(op, tokens, dtype=dtype, rank=16 if "lora" in op else 0, **change)
        for op in ops
        for tokens in TOKENS
        for dtype in DTYPES
        for change in changes
        if not (backward and "batch_invariant" in change)
    ]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """GPU entries say that they can run."""
    for op, listed in registry._ENTRIES.items():
        replaced = [
            dataclasses.replace(entry, available=registry.always_available)
            if entry.backend in ("cuda:sm80", "triton")
            else entry
            for entry in listed
        ]
        monkeypatch.setitem(registry._ENTRIES, op, replaced)
    return monkeypatch


def chosen_line(text: str) -> str:
    (line,) = (line for line in text.splitlines() if " chosen" in line)
    return line


@pytest.mark.parametrize(
    ("tokens", "changes", "facts", "said"),
    [
        (
            *(1, {}, H200),
            "decode: fused, mma.sync of sm_80 (tiles of 128 rows by 8 tokens, K in 8); "
            "not wgmma: tokens must be in 17 ... 512, got 1",
        ),
        (
            *(100, {}, A100),
            "4 passes over the weight: fused, mma.sync of sm_80 (tiles of 128 rows by 32 tokens, "
            "K in 6); not wgmma: the GPU must be sm_90, got sm_80",
        ),
        (
            *(100, {"batch_invariant": True}, H200),
            "4 passes over the weight: fused, mma.sync of sm_80 (tiles of 128 rows by 32 tokens, "
            "K in 8); not wgmma: batch_invariant: its sums depend on the number of tokens",
        ),
        (512, {}, H200, "wgmma: fused, for sm_90a (tiles of 256 rows by 64 tokens)"),
        (
            *(2048, {}, H200),
            "dequantize + GEMM over K + R (the adapter as further columns of the weight); "
            "not fused: tokens must be at most 128, got 2048; "
            "not wgmma: tokens must be in 17 ... 512, got 2048",
        ),
        (
            *(4, {"in_features": 4104, "op": "quantized_matmul", "rank": 0}, H200),
            "dequantize + GEMM; neither fused nor wgmma: in_features must be a multiple of 64, "
            "got 4104",
        ),
        (
            *(4, {"dtype": torch.float32, "in_features": 16_384}, H200),
            "dequantize + GEMM, and another that adds the adapter; "
            "neither fused nor wgmma: dtype must be float16 or bfloat16, got float32",
        ),
        (
            *(8192, {"op": "qlora_linear_backward", "rank": 128}, H200),
            "dequantize + GEMM, gradients of the adapter's B: float32 by kernel, bfloat16 by gemm",
        ),
        (4, {"op": "quantized_matmul_backward_input"}, A100, "dequantize + GEMM"),
        (0, {}, A100, "nothing to compute"),
    ],
)
def test_cuda_says_its_path_and_why_not_the_others(
    pretend: pytest.MonkeyPatch,
    tokens: int,
    changes: dict[str, object],
    facts: DeviceFacts,
    said: str,
) -> None:
    pretend.setattr(cuda_explained, "device_facts", lambda device: facts)
    text = explain_problem(problem(tokens=tokens, **changes))
    assert chosen_line(text) == f"  cuda:sm80        chosen, path {said}"


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: f"sm_{facts.capability}")
def test_cuda_says_the_path_that_is_taken(facts: DeviceFacts) -> None:
    begins = {"wgmma": ("wgmma: ",), "dense": ("dequantize + GEMM",), "fused": ("decode: ",)}
    seen = Counter[str]()
    for p in problems(backward=False):
        said = describe_forward(p, facts)
        sizes = cuda_choice.MatmulSizes(
            *(p.tokens, p.out_features, p.in_features, p.dtype, p.block_size),
            *(p.batch_invariant, facts.capability),
        )
        path = cuda_choice.choose_path(sizes)
        seen[path] += 1
        if p.tokens == 0:
            assert said == "nothing to compute"
        elif path == "fused" and p.tokens > 32:
            passes = -(-p.tokens // 32)
            assert said.startswith(f"{passes} passes over the weight: fused")
        else:
            assert said.startswith(begins[path])
        assert ("wgmma: None" in said, "fused: None" in said) == (False, False)
    assert set(seen) == ({"fused", "dense"} | ({"wgmma"} if facts is H200 else set()))
    assert all(
        describe_backward(p, facts).startswith("dequantize + GEMM") == (p.tokens > 0)
        for p in problems(backward=True)
    )


@pytest.mark.skipif(
    "cuda_archs" not in library.load().build, reason="the library was built without CUDA"
)
def test_tiles_are_those_of_the_launcher() -> None:
    tiles = torch.ops.qlora_kernels_cuda.fused_matmul_tiles.default
    for tokens in range(1, 140):
        columns = cuda_choice.fused_tile_tokens(tokens)
        assert tiles(tokens, 3 * cuda_choice.TILE_N) == 3 * -(-tokens // columns)


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: f"sm_{facts.capability}")
def test_triton_says_the_path_that_is_taken(facts: DeviceFacts) -> None:
    begins = {"dense": "dequantize + GEMM", "few_tokens": "few_tokens", "one_token": "one_token"}
    for backward in (False, True):
        for p in problems(backward):
            said = triton_explained.describe(p, facts)
            sizes = launch_config.MatmulSizes(
                *(p.tokens, p.out_features, p.in_features, p.dtype, p.block_size),
                p.batch_invariant,
            )
            path = launch_config.choose_path(sizes)
            if p.tokens == 0:
                assert said == "nothing to compute"
            elif backward and path != "dense":
                assert said.startswith("fused (tiles of")
            else:
                assert said.startswith(begins.get(path, "fused (tiles of"))
            assert "None" not in said


def test_triton_says_its_tiles(pretend: pytest.MonkeyPatch) -> None:
    pretend.setattr(triton_explained, "device_facts", lambda device: H200)
    with qlk.backend("triton"):
        text = explain_problem(problem(tokens=8))
    said = "few_tokens: fused (tiles of 8 tokens, 64 rows, 256 columns, sum in 6, decode by prmt)"
    assert chosen_line(text) == f"  triton           chosen, path {said}"


@pytest.mark.parametrize("isa", [i for i in range(len(ISA_NAMES)) if i <= machine_isa()])
def test_the_cpu_says_the_path_that_runs(monkeypatch: pytest.MonkeyPatch, isa: int) -> None:
    ran = []

    def panels(name: str) -> object:
        inner = getattr(cpu_entry, name)
        return lambda *arguments: ran.append("panels") or inner(*arguments)

    for name in ("matmul_by_panels", "backward_by_panels"):
        monkeypatch.setattr(cpu_entry, name, panels(name))
    native = torch.ops.qlora_kernels_cpu

    class Spied:
        """The native ops; of the products, whether tiles were asked for."""

        def __getattr__(self, op: str) -> object:
            packet = getattr(native, op)
            if not op.startswith("quantized_matmul"):
                return packet

            def spied(*arguments: object) -> object:
                ran.append("tiles" if arguments[-2] else "dot")
                return packet.default(*arguments)

            return types.SimpleNamespace(default=spied)

    monkeypatch.setattr(torch.ops, "qlora_kernels_cpu", Spied())
    for block_size in (16, 64):
        weight = random_weight((33, 64), block_size)
        for dtype in DTYPES:
            for tokens in TOKENS[1:-2]:
                forward = Problem("quantized_matmul", "cpu", dtype, tokens, 33, 64)
                forward = forward._replace(block_size=block_size)
                cpu_entry.quantized_matmul_cpu(isa, torch.ones(tokens, 64, dtype=dtype), weight)
                assert cpu_path(isa, forward).startswith(ran.pop())
                backward = forward._replace(op="quantized_matmul_backward_input")
                grad_y = torch.ones(tokens, 33, dtype=dtype)
                cpu_entry.quantized_matmul_backward_input_cpu(isa, grad_y, weight)
                assert cpu_path(isa, backward).startswith(ran.pop())
                assert not ran


def test_the_cpu_says_why_not_dot() -> None:
    bf16_amx = Problem("qlora_linear", "cpu", BF16, 64, 512, 512, 16)
    amx, avx2 = ISA_NAMES.index("amx"), ISA_NAMES.index("avx2")
    assert cpu_path(amx, bf16_amx) == "tiles: fused, AMX products of bf16"
    assert cpu_path(amx, bf16_amx._replace(tokens=1)) == "dot: fused dot products"
    assert cpu_path(avx2, bf16_amx) == (
        "panels: dequantize panel by panel + torch's float32 GEMM; "
        "not dot: tokens must be at most 12, got 64"
    )
    assert cpu_path(avx2, bf16_amx._replace(block_size=16)) == (
        "panels: dequantize whole + torch's float32 GEMM; "
        "not dot: block_size must be at least 32, got 16"
    )
    assert cpu_path(avx2, bf16_amx._replace(tokens=0)) == "nothing to compute"


def test_explain_shows_the_path_of_the_chosen_kernel_alone() -> None:
    qw = qlk.quantize(torch.randn(64, 64))
    for entry in entries("qlora_linear"):
        if entry.backend.startswith("cpu:") and entry.available() is None:
            with qlk.backend(entry.backend):
                text = qlk.explain("qlora_linear", qw, torch.float32, tokens=2)
            assert chosen_line(text).endswith("chosen, path dot: fused dot products")
            assert text.count("path") == 1
    with qlk.backend("reference"):
        assert "path" not in qlk.explain("qlora_linear", qw, torch.float32)
