"""The emulation itself: instructions do what the PTX manual says, and misuse is refused."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_instructions import CHECKS, words
from tests.emulation.cuda.runner import MODES, KernelStopped, Runner

# As in instructions.cu: fault -> what some mode must say of it, and the modes that must.
FAULTS = {
    "missing_barrier": (1, {"races": "data race"}),
    "barrier_in_branch": (2, {"plain": "meets __syncthreads at line", "races": "at line"}),
    "two_barriers": (3, {"plain": "meets __syncthreads at line", "memory": "at line"}),
    "missing_syncwarp": (4, {"races": "data race"}),
    "no_wait": (6, {"plain": "never waited for", "memory": "never waited", "races": "never"}),
    "wrong_mask": (7, dict.fromkeys(MODES, "__shfl_xor_sync (with mask|waits)|wait for it in")),
    "missing_lane": (8, dict.fromkeys(MODES, "ends while others wait|which has ended")),
    "shared_overflow": (9, {"memory": "AddressSanitizer|index 64 out of bounds"}),
    "dynamic_overflow": (10, {"memory": "AddressSanitizer", "plain": "dynamic shared memory"}),
    "unaligned_copy": (11, {"plain": "not aligned", "memory": "not aligned"}),
}


@pytest.mark.parametrize("name", CHECKS)
def test_instruction_does_what_the_manual_says(name: str, runner: Runner, seeds: range) -> None:
    for seed in seeds:
        CHECKS[name](runner, seed)


def faulty(runner: Runner, fault: int, seed: int) -> torch.Tensor:
    return runner.call(
        "faulty",
        seed=seed,
        integers={"fault": fault},
        inputs={"source": words(64 * 4 + 4)},
        outputs={"result": torch.empty(64, dtype=torch.int32)},
    )["result"]


def test_right_kernel_gives_the_right_result_in_every_order(runner: Runner, seeds: range) -> None:
    source = words(64 * 4 + 4)
    own = source[:64].flip(0) + source[:64] + source[: 64 * 4 : 4]
    pairs = own + own.reshape(-1, 2).flip(1).reshape(-1)
    for seed in seeds:
        got = faulty(runner, 0, seed)
        assert torch.equal(got, pairs.reshape(-1, 2).flip(1).reshape(-1))


@pytest.mark.parametrize("name", FAULTS)
def test_misuse_is_refused(name: str, mode: str, runner: Runner, seeds: range) -> None:
    fault, said = FAULTS[name]
    if mode not in said:
        pytest.skip(f"{mode} need not see it")
    with pytest.raises(KernelStopped, match=said[mode]):
        for seed in seeds:
            faulty(runner, fault, seed)


def test_missing_wait_gives_poison(runner: Runner) -> None:
    right, wrong = faulty(runner, 0, 0), faulty(runner, 5, 0)
    assert (right != wrong).all()


def test_missing_barrier_shows_in_some_order(mode: str, runner: Runner) -> None:
    if mode != "plain":
        pytest.skip("the orders are the same in every mode")
    right = faulty(runner, 0, 0)
    assert any(not torch.equal(faulty(runner, 1, seed), right) for seed in range(5))
