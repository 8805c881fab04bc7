"""On hardware: qlora_group, QLoRAGroup and dequantize_many of both GPU backends, by the checks that
tests/ops and tests/nn run on the CPU."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.backends.registry import entries
from tests.group_checks import (
    ALL,
    backward,
    check_dequantize_many,
    check_grouped_model,
    check_invariance,
    check_members,
    check_needs,
    check_sums,
    forward,
    member,
    mixed_weights,
    problems,
)
from tests.nn.groups import attention
from tests.problems import DTYPES, problem_on

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
BF16 = torch.bfloat16
# The paths of both: one pass, several, Hopper's kernel where there is one, dequantize and a GEMM.
TOKENS = (1, 9, 33, 129, 513)


@pytest.fixture(params=["cuda:sm80", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """A backend that is to run everything; there must be a reason if it cannot."""
    name: str = request.param
    for op in ("qlora_group", "qlora_group_backward", "dequantize_many"):
        (found,) = (e for e in entries(op) if e.backend == name)
        if found.available() is not None:
            pytest.skip(found.available())
    return name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_each_member_is_as_accurate_as_alone(
    device: torch.device, backend: str, tokens: int, dtype: torch.dtype, dropout_p: float
) -> None:
    with qlk.backend(backend):
        for cols, block_size in ((192, 64), (96, 32)):
            check_members(device, problems(tokens, dtype, dropout_p, cols, block_size))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_grad_x_is_the_members_sum(
    device: torch.device, backend: str, tokens: int, dtype: torch.dtype, dropout_p: float
) -> None:
    with qlk.backend(backend):
        check_sums(device, problems(tokens, dtype, dropout_p, 192, 64))


@pytest.mark.parametrize("tokens", [0, 4, 129, 600])
def test_no_tokens_and_no_gradients(device: torch.device, backend: str, tokens: int) -> None:
    for dtype in DTYPES:
        with qlk.backend(backend):
            check_needs(device, problems(tokens, dtype, 0.2, 192, 64))


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_batch_invariant_rows(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    with qlk.backend(backend):
        for tokens in (9, 33, 200):
            check_invariance(device, problems(tokens, dtype, 0.0, 192, 64))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_grouped_model_is_as_accurate(
    device: torch.device, backend: str, dtype: torch.dtype, dropout: float
) -> None:
    with qlk.backend(backend):
        for tokens_each in (8, 70, 300):
            model = attention(dropout)
            first = check_grouped_model(device, model, dtype, tokens_each)
            again = check_grouped_model(device, model, dtype, tokens_each)
            assert all(map(torch.equal, first, again)), "two runs give the same bits"


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_many_weights_of_all_kinds(
    device: torch.device, backend: str, dtype: torch.dtype | None
) -> None:
    with qlk.backend(backend):
        check_dequantize_many(device, mixed_weights(repeats=3), dtype)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_cuda_graph_replays(device: torch.device, backend: str, tokens: int) -> None:
    group = [problem_on(device, p) for p in problems(tokens, BF16, 0.1, 192, 64)]
    members, x, grads = [member(p) for p in group], group[0].x, [p.grad_y for p in group]
    # Those that kernels take as they are stored.
    many = [qw.to(device) for qw in mixed_weights()[:7]]

    def run() -> list[torch.Tensor]:
        ys, xa = forward(members, x)
        grad_x, grads_a, grads_b = backward(members, x, xa, grads, ALL)
        return [*qlk.dequantize_many(many), *ys, xa, grad_x, *grads_a, *grads_b]

    with qlk.backend(backend):
        eager = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
    for result in captured:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, eager))
