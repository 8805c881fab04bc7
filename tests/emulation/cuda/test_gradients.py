"""The adapter's gradients in CUDA, emulated: right and with the same bits in every order of the
threads, with no access outside a buffer and no race."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.cuda import dense_path, low_rank
from qlora_kernels.backends.cuda import qlora_linear as qlora_entry
from qlora_kernels.reference import dequantize_reference, dropout_reference
from tests import cuda_gradients
from tests.cuda_gradients import CHECKS
from tests.emulation.cuda.runner import Runner
from tests.problems import random_qlora, random_weight
from tests.tolerances import assert_qlora_backward


@pytest.mark.parametrize("name", CHECKS)
def test_gradients(name: str, runner: Runner, seeds: range) -> None:
    for seed in seeds:
        CHECKS[name](runner, seed)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_whole_backward(
    dropout_p: float, mode: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry with the emulated kernels in it: the same sums, each result where it belongs."""
    if mode != "plain":
        pytest.skip("the kernels' own tests run in every mode")

    def adapter_gradients(grad_y, xa, lora_b, scaling, token_slices, extended):
        got = cuda_gradients.low_rank_gradient(
            runner,
            1,
            grad_y,
            xa,
            token_slices,
            lora_b=lora_b,
            copy_stride=0 if extended is None else extended.shape[1],
        )
        jobs = [
            (got["u_partials"], scaling, grad_y.dtype),
            (got["gradient_partials"], scaling, lora_b.dtype),
        ]
        if extended is None:
            return tuple(cuda_gradients.partial_sums(runner, 1, jobs))
        rows, (width, stride) = grad_y.shape[1], (extended.shape[1], extended.shape[1])
        u, grad_b, tail = cuda_gradients.partial_sums(runner, 1, jobs, (stride, width - rows))
        assert extended.is_contiguous()
        extended[:, :rows] = got["copy"][:, :rows]
        extended[:, rows:] = torch.nn.functional.pad(tail, (0, rows)).view(-1, stride)[
            :, : width - rows
        ]
        return u, grad_b

    def token_product(data, left, scaling, token_slices, dtype, rank_major):
        got = cuda_gradients.low_rank_gradient(
            runner, 2, data, left, token_slices, rank_major=rank_major
        )
        return cuda_gradients.partial_sums(runner, 2, [(got["gradient_partials"], scaling, dtype)])[
            0
        ]

    monkeypatch.setattr(low_rank, "run_adapter_gradients", adapter_gradients)
    monkeypatch.setattr(low_rank, "run_token_product", token_product)
    monkeypatch.setattr(dense_path, "dequantize_cuda", dequantize_reference)
    monkeypatch.setattr(dense_path, "dropout_cuda", dropout_reference)
    for dtype, rank, rows in ((torch.bfloat16, 16, 520), (torch.float16, 5, 65)):
        p = random_qlora(
            150, random_weight((rows, 128), 64), rank, dtype, torch.float32, dropout_p=dropout_p
        )
        xa = torch.nn.functional.linear(
            dropout_reference(p.x, p.dropout_p, p.seed), p.lora_a.to(dtype)
        )
        gradients = qlora_entry.qlora_linear_backward_cuda(
            p.grad_y, p.x, xa, p.weight, p.lora_a, p.lora_b, p.scaling, p.dropout_p, p.seed
        )
        assert_qlora_backward(gradients, p)
