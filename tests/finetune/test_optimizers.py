"""`--optim`: what runs here learns, keeps what it promises, and resumes to the bit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kernels.finetune.checkpoint import (
    Progress,
    load_checkpoint,
    save_checkpoint,
    trained_parameters,
)
from qlora_kernels.finetune.data import ByteTokenizer, load_windows
from qlora_kernels.finetune.load import load_base, prepare
from qlora_kernels.finetune.loop import Job, train_step
from qlora_kernels.finetune.optimizers import (
    NEEDS_GPU,
    OPTIMIZERS,
    clip_gradients,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
)
from qlora_kernels.finetune.settings import Settings
from tests.finetune.running import Command, losses

CPU = torch.device("cpu")
RUNS_HERE = sorted(
    name
    for name, choice in OPTIMIZERS.items()
    if name not in NEEDS_GPU and importlib.util.find_spec(choice.package.split(".")[0])
)
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture(params=RUNS_HERE)
def fresh(request: pytest.FixtureRequest, corpus: Path) -> Callable[[], Job]:
    """Makes the job of a short QLoRA run with an optimizer, as a new process would."""

    def make() -> Job:
        settings = Settings(
            "qlora",
            corpus.parent / "run",
            data=(str(corpus),),
            optim=request.param,
            rank=16,
            steps=6,
            batch=1,
            seq_len=32,
            lr=1e-3,
        )
        model = prepare(load_base(settings), settings)
        trained = trained_parameters(model).values()
        optimizer = make_optimizer(trained, settings.optim, settings.lr, CPU)
        windows = load_windows(settings, ByteTokenizer())
        return Job(settings, model, optimizer, windows, Progress(), lambda: None)

    return make


def test_resumes_bit_for_bit(fresh: Callable[[], Job], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    job = fresh()
    for step in range(3):
        train_step(job, step)
    identity = {"optim": job.settings.optim}
    save_checkpoint(path, job.model, job.optimizer, Progress(step=3), identity)
    wanted = [train_step(job, step) for step in range(3, 6)]

    resumed = fresh()
    saved = load_checkpoint(path)
    saved.restore(resumed.model, resumed.optimizer)
    assert [train_step(resumed, step) for step in range(3, 6)] == wanted
    for name, parameter in trained_parameters(job.model).items():
        assert torch.equal(parameter, trained_parameters(resumed.model)[name])
    # With the moments at zero, the same steps give other losses.
    for name in [name for name in saved.tensors if name.startswith("optimizer.")]:
        del saved.tensors[name]
    without = fresh()
    saved.restore(without.model, without.optimizer)
    assert [train_step(without, step) for step in range(3, 6)] != wanted

    bits = 8 if job.settings.optim.endswith("8bit") else 32
    states = {
        name: tensor
        for name, tensor in load_checkpoint(path).tensors.items()
        if name.endswith((".exp_avg", ".exp_avg_sq", ".state1", ".state2"))
    }
    large = [tensor for tensor in states.values() if tensor.numel() >= 4096]
    assert large and all(tensor.itemsize * 8 == bits for tensor in large)


def test_a_state_that_does_not_fit_is_named() -> None:
    pytest.importorskip("bitsandbytes", reason="in the bnb extra")
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.ones_like(parameter)
    small = make_optimizer([parameter], "adamw-8bit", 1e-3, CPU)
    small.step()
    state = optimizer_state(small, parameter)
    whole = make_optimizer([parameter], "paged-adamw", 1e-3, CPU)
    assert "qmap1" in str(restore_optimizer(whole, {parameter: state}))
    state["absmax1"] = state["absmax1"][1:]
    other = make_optimizer([parameter], "adamw-8bit", 1e-3, CPU)
    assert "absmax1" in str(restore_optimizer(other, {parameter: state}))


def test_the_option_reaches_the_run(command: Command) -> None:
    assert command.here("--method", "lora", "--optim", "adamw-fused", "--out", "run") == 0
    train, before, after = losses(command.folder / "run", "lora")
    assert len(train) == 6 and after < before
    # The optimizer is part of what a run is.
    assert command.here("--method", "lora", "--out", "run", "--resume") == 2


def test_gpu_only_optimizer_names_the_others(
    command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.here("--optim", "offload-adamw", "--device", "cpu", "--method", "lora") == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "paged-adamw" in err and "for GPUs" in err


def test_missing_package_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert command.here("--optim", "paged-adamw", "--method", "lora", "--out", "run") == 1
    assert "pip install 'qlora_kernels[bnb]'" in capfd.readouterr().err
    assert not (command.folder / "run").exists()


class Offloaded:
    """What torchao's CPUOffloadOptimizer keeps, with both of its sides on the CPU."""

    class Stream:
        waited = 0

        def synchronize(self) -> None:
            self.waited += 1

    def __init__(self, large: torch.nn.Parameter, small: torch.nn.Parameter) -> None:
        self.stream = self.Stream()
        host = large.detach().clone()
        self.param_d2h_map = {large: host}
        self.optim_dict = {large: torch.optim.AdamW([host], lr=0.1, fused=True)}
        self.d_opt = torch.optim.AdamW([small], lr=0.1)

    @property
    def param_groups(self) -> list[Any]:
        return [group for o in (*self.optim_dict.values(), self.d_opt) for group in o.param_groups]

    def step(self) -> None:
        for parameter, optimizer in self.optim_dict.items():
            optimizer.step()
            parameter.detach().copy_(self.param_d2h_map[parameter])
        self.d_opt.step()


def test_offloaded_state_is_saved_restored_and_clipped() -> None:
    """Its parts are not where other optimizers have theirs."""

    def parameters() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        return torch.nn.Parameter(torch.ones(8, 8)), torch.nn.Parameter(torch.ones(3))

    def give_gradients(optimizer: Offloaded, size: float) -> None:
        for large, host in optimizer.param_d2h_map.items():
            host.grad = torch.full_like(large, size)
        optimizer.d_opt.param_groups[0]["params"][0].grad = torch.full((3,), size)

    pair = parameters()
    first = Offloaded(*pair)
    give_gradients(first, 1.0)
    clip_gradients(first, 0.5)
    assert first.stream.waited == 1
    gradients = [p.grad for group in first.param_groups for p in group["params"]]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)
    first.step()
    states = {p: optimizer_state(first, p) for p in pair}
    assert all({"step", "exp_avg", "exp_avg_sq"} <= state.keys() for state in states.values())

    copies = parameters()
    with torch.no_grad():
        for copy, original in zip(copies, pair, strict=True):
            copy.copy_(original)
    second = Offloaded(*copies)
    second.param_d2h_map[copies[0]].zero_()  # made before the parameter had its value
    restored = {copy: states[original] for copy, original in zip(copies, pair, strict=True)}
    assert restore_optimizer(second, restored) is None
    for optimizer in (first, second):
        give_gradients(optimizer, 0.3)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(pair, copies, strict=True))
