"""DDP and FSDP2, by hand and by accelerate, on two processes (gloo, CPU) against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("peft", reason="in the hf extra")
from tests.integrations.distributed_worker import model_of, step
from tests.integrations.models import tokens

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def launched(*command: str) -> None:
    """Run a launcher's module to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("distributed") / "seen.json"
    command = ["torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    launched(*command, "-m", "tests.integrations.distributed_worker", str(out))
    return out.parent, json.loads(out.read_text())


WAYS = ["own ddp", "own fsdp", "own reloaded"]
WAYS += ["peft ddp", "peft fsdp", "peft fsdp apart", "peft reloaded"]


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_equal_one_process(
    run: tuple[Path, dict[str, float]], way: str
) -> None:
    seen = run[1]
    # fp32 sums over half of the batch each, then over the processes.
    assert seen[f"{way} loss"] < 1e-6
    assert seen[f"{way} gradients"] < 1e-5


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_stored_weights_are_sharded_and_never_cast(
    run: tuple[Path, dict[str, float]], kind: str
) -> None:
    seen = run[1]
    assert seen[f"{kind} local bytes"] == 0.5
    assert seen[f"{kind} mixed precision keeps weights"] == 1.0
    # bf16's own error over the whole model, which dense linear layers have too.
    gradients = f"{kind} mixed precision gradients"
    assert 0 < seen[gradients] < 2 * seen[f"{gradients} of a dense model"]


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_checkpoint_of_two_processes_is_read_by_one(
    run: tuple[Path, dict[str, float]], kind: str
) -> None:
    wanted_model, model = model_of(kind), model_of(kind)
    wanted, gradients = step(wanted_model, tokens())
    for parameter in model.parameters():
        parameter.data.zero_()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(run[0] / f"dcp_{kind}"), no_dist=True)
    model.load_state_dict(state)
    loss, got = step(model, tokens())
    assert loss == wanted
    assert all(torch.equal(got[name], gradients[name]) for name in gradients)


def test_accelerate_launch_with_fsdp2(tmp_path: Path) -> None:
    """Its own launcher and configuration: sharded, sent from the first process, trained, saved."""
    pytest.importorskip("accelerate", reason="in the hf extra")
    out = tmp_path / "seen.json"
    command = ["accelerate.commands.launch", "--config_file", "tests/integrations/fsdp2.yaml"]
    launched(*command, "--module", "tests.integrations.accelerate_worker", str(out))
    seen = json.loads(out.read_text())
    assert seen["kind"] == "DistributedType.FSDP"
    for kind in ("own", "peft"):
        assert seen[f"{kind} sharded"] and seen[f"{kind} layers"] > 2
        for number in range(2):
            assert seen[f"{kind} loss {number}"] < 1e-6
            assert seen[f"{kind} gradients {number}"] < 1e-5
        assert seen[f"{kind} frozen"] and seen[f"{kind} trained"] < 0.01
