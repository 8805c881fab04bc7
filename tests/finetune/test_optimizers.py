"""`--optim`: what runs here learns, keeps what it promises, and resumes to the bit."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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


class Stream:
    """A stream of a device that has finished everything when it is asked to."""

    def __init__(self) -> None:
        self.waited = 0

    def wait_stream(self, other: Stream) -> None:
        pass

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None:
        self.waited += 1


class OnTheHost:
    """torch as torchao's offloaded optimizer sees it, with the device's side on the host as well;
    `cuda` is what it asks of a device, and pinned memory is plain."""

    def __init__(self, streams: list[Stream]) -> None:
        def stream() -> Stream:
            streams.append(Stream())
            return streams[-1]

        self.cuda = SimpleNamespace(
            Stream=stream, current_stream=Stream, stream=lambda _: contextlib.nullcontext()
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty_like(self, tensor: torch.Tensor, pin_memory: bool = False, **options: Any) -> Any:
        return torch.empty_like(tensor, **options)


def both_sides_on_the_host(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """Lets torchao's own CPUOffloadOptimizer run without a GPU; returns the streams it makes."""
    pytest.importorskip("torchao", reason="in the bench extra")
    module = importlib.import_module("torchao.optim.cpu_offload")
    streams: list[Stream] = []
    monkeypatch.setattr(module, "torch", OnTheHost(streams))
    monkeypatch.setattr(module, "get_available_devices", lambda: ["cpu", "cuda"])
    return streams


@pytest.fixture(params=[*RUNS_HERE, *sorted(NEEDS_GPU)])
def fresh(
    request: pytest.FixtureRequest, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Job]:
    """Makes the job of a short QLoRA run with an optimizer, as a new process would."""
    device = CPU
    if request.param in NEEDS_GPU:
        both_sides_on_the_host(monkeypatch)
        device = torch.device("cuda")

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
        optimizer = make_optimizer(trained, settings.optim, settings.lr, device)
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


def test_offloaded_state_is_saved_restored_and_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts are not where other optimizers have theirs."""
    streams = both_sides_on_the_host(monkeypatch)

    def pair() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """One that is offloaded, and one that is too small to be."""
        return torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(3))

    def give_gradients(pair: tuple[torch.nn.Parameter, ...], size: float) -> None:
        for parameter in pair:
            parameter.grad = None
        torch.stack([(size * parameter).sum() for parameter in pair]).sum().backward()

    parameters = pair()
    first: Any = make_optimizer(parameters, "offload-adamw", 0.1, torch.device("cuda"))
    assert list(first.param_d2h_map) == [parameters[0]]
    give_gradients(parameters, 1.0)
    before = streams[0].waited
    clip_gradients(first, 0.5)
    assert streams[0].waited == before + 1
    gradients = [p.grad for group in first.param_groups for p in group["params"]]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)
    first.step()
    states = {p: optimizer_state(first, p) for p in parameters}
    assert all({"step", "exp_avg", "exp_avg_sq"} <= state.keys() for state in states.values())

    copies = pair()
    second: Any = make_optimizer(copies, "offload-adamw", 0.1, torch.device("cuda"))
    with torch.no_grad():  # after the optimizer has copied what they were
        for copy, original in zip(copies, parameters, strict=True):
            copy.copy_(original)
    restored = {copy: states[original] for copy, original in zip(copies, parameters, strict=True)}
    assert restore_optimizer(second, restored) is None
    for optimizer, given in ((first, parameters), (second, copies)):
        give_gradients(given, 0.3)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    assert not torch.equal(parameters[0], torch.ones(64, 64))
