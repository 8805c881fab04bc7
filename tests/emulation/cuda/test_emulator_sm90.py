"""The emulation of sm_90: instructions do what the PTX manual says, and misuse is refused."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_instructions import words
from tests.cuda_instructions_sm90 import CHECKS
from tests.emulation.cuda.runner import KernelStopped, Runner

# As in faults_sm90.cu: kernel -> fault -> its number, and what a mode that must see it says; ""
# where the result is wrong.
PIPELINE = {
    "no_wait_for_full": (1, {"plain": "", "races": "data race"}),
    "no_wait_for_empty": (2, {"plain": "under way at once|more than 1 arrivals", "races": ""}),
    "too_few_bytes": (3, {"plain": "copies of 128 bytes complete on .* expects 112"}),
    "too_many_bytes": (4, {"plain": "deadlock(.|\n)*144 bytes expected, 128 under way"}),
    "no_expectation": (5, {"plain": "copies of 128 bytes complete on .* expects 0"}),
    "wrong_parity": (6, {"plain": "", "races": ""}),
    "one_arrival_too_many": (7, {"plain": "more than 1 arrivals in phase"}),
    "no_init_fence": (8, {"plain": "no fence_mbarrier_init"}),
    "no_barrier_after_init": (9, {"plain": "nobody initialised|init", "races": ""}),
    "unaligned_destination": (10, {"plain": "not 16 aligned bytes"}),
    "outside_shared": (11, {"plain": "not 16 aligned bytes of shared memory"}),
    "nobody_waits": (12, {"plain": "bulk copies that nobody waited for"}),
    "copied_twice": (13, {"plain": "two copies .* under way at once"}),
    "no_init": (14, {"plain": "nobody initialised"}),
}
WGMMA = {
    "no_wait": (1, {"plain": "ends with wgmmas it never waited for"}),
    "reads_too_early": (2, {"plain": ""}),
    "tile_overwritten": (3, {"plain": "", "races": "data race"}),
    "left_overwritten": (4, {"plain": "left operands were written"}),
    "sums_overwritten": (5, {"plain": "accumulators were written"}),
    "no_fence": (6, {"plain": "without wgmma.fence"}),
    "warps_differ": (7, {"plain": "of another warp of its warpgroup"}),
    "warp_leaves_out": (8, {"plain": "of another warp|fewer or more wgmmas"}),
    "tile_not_there": (9, {"races": "data race"}),
    "unaligned_tile": (10, {"plain": "not at a boundary of its 8 rows"}),
    "tile_outside": (11, {"plain": "shared memory has no 16 bytes at"}),
    "lane_leaves_out": (
        12,
        {"plain": "meets wgmma.bf16 with|meets wgmma.commit_group with|wait for it in"},
    ),
}
OVERLAP = {
    "never_waits": (1, {"plain": "never waits for it"}),
    "reads_before_waiting": (2, {"plain": "", "races": "data race"}),
    "overwrites_before_waiting": (3, {"plain": "", "races": "data race"}),
    "one_thread_waits": (4, {"plain": "", "races": "data race"}),
}
BARRIER = {
    "other_count": (1, {"plain": "meets itself with|deadlock(.|\n)*barrier 3 with 256 of 512"}),
    "number_zero": (2, {"plain": "__syncthreads has 0"}),
    "too_few_threads": (3, {"plain": "deadlock(.|\n)*barrier 3 with 256 of 512"}),
    "no_registers": (4, {"plain": "deadlock(.|\n)*registers, 0 are free"}),
    "too_many_registers": (5, {"plain": "setmaxnreg.dec to 160 registers from 128"}),
}


@pytest.mark.parametrize("name", CHECKS)
def test_instruction_does_what_the_manual_says(name: str, runner: Runner, seeds: range) -> None:
    for seed in seeds:
        CHECKS[name](runner, seed)


def pipeline(runner: Runner, fault: int, seed: int) -> None:
    rounds = 2 if fault == PIPELINE["nobody_waits"][0] else 6
    source = words(rounds, 32)
    got = runner.call(
        "faulty_pipeline",
        seed=seed,
        integers={"fault": fault, "rounds": rounds},
        inputs={"source": source},
        outputs={"result": torch.empty(32, dtype=torch.int32)},
    )["result"]
    assert torch.equal(got, source.sum(0, dtype=torch.int32)), "wrong sums"


def wgmma(runner: Runner, fault: int, seed: int) -> None:
    got = runner.call(
        "faulty_wgmma",
        seed=seed,
        integers={"fault": fault},
        inputs={"source": torch.ones(512, dtype=torch.bfloat16)},
        outputs={"result": torch.empty(512)},
    )["result"]
    assert torch.equal(got, torch.full((512,), 16.0)), "wrong products"


def overlap(runner: Runner, fault: int, seed: int) -> None:
    source = words(64)
    got = runner.call(
        "faulty_overlap",
        seed=seed,
        integers={"fault": fault},
        changed={"input": source},
        outputs={
            "between": torch.empty(64, dtype=torch.int32),
            "result": torch.empty(64, dtype=torch.int32),
        },
    )["result"]
    assert torch.equal(got, source), "stale values"


def barrier(runner: Runner, fault: int, seed: int) -> None:
    outputs = {"result": torch.empty(512, dtype=torch.int32)}
    got = runner.call("faulty_barrier", seed=seed, integers={"fault": fault}, outputs=outputs)
    assert torch.equal(got["result"], torch.arange(512, dtype=torch.int32))


KERNELS = {
    pipeline: PIPELINE,
    wgmma: WGMMA,
    overlap: OVERLAP,
    barrier: BARRIER,
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_right_kernel_is_accepted(kernel, runner: Runner, seeds: range) -> None:
    for seed in seeds:
        kernel(runner, 0, seed)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(kernel, name) for kernel, faults in KERNELS.items() for name in faults],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_misuse_is_seen(kernel, name: str, mode: str, runner: Runner, seeds: range) -> None:
    fault, said = KERNELS[kernel][name]
    if mode not in said:
        pytest.skip(f"{mode} need not see it")
    expected = KernelStopped if said[mode] else AssertionError
    with pytest.raises(expected, match=said[mode] or None):
        for seed in seeds:
            kernel(runner, fault, seed)
