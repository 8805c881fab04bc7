"""DDP and FSDP2 on two processes (gloo, CPU) against one."""

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("distributed") / "seen.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "-m", "tests.integrations.distributed_worker", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
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
    assert seen[f"{kind} mixed precision gradients"] < 5e-2


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
