"""Conversion holds one layer's dense weight beyond what it was given, and lets go of the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 12
# 64 MiB in fp32, above malloc's largest threshold for memory that it maps and unmaps at once, so
# that resident memory follows what is held.
SIZE = 4096
LAYER_BYTES = SIZE * SIZE * 4

# Prints resident bytes: before the conversion, its peak, and after it.
PROBE = """
import gc, json, sys
from pathlib import Path
import torch
from torch import nn
from qlora_kernels.finetune.load import BaseModel, prepare
from qlora_kernels.finetune.memory import reset_resident_peak, resident_peak
from qlora_kernels.finetune.settings import Settings

def resident():
    gc.collect()
    reset_resident_peak()
    return resident_peak()

layers, size, method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
settings = Settings(method, Path("x"), rank=1)
def model(count):
    return nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))
# Once before, so that libraries, thread stacks and tables are there.
prepare(BaseModel(model(1), 256, None, "lm_head"), settings)
base = BaseModel(model(layers), 256, None, "lm_head")
kept = list(base.model) if len(sys.argv) > 4 else None
start = resident()
prepare(base, settings)
peak = resident_peak()
print(json.dumps([start, peak, resident()]))
"""


def measure(method: str, *extra: str) -> tuple[int, int, int]:
    """Resident bytes before, at the peak of, and after converting `LAYERS` layers."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(LAYERS), str(SIZE), method, *extra],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    start, peak, end = json.loads(done.stdout)
    return start, peak, end


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="resident peaks cannot be reset here"
    ),
]


def test_conversion_holds_one_dense_layer_more() -> None:
    start, peak, end = measure("qlora")
    assert start > LAYERS * LAYER_BYTES
    assert peak - start < LAYER_BYTES
    # Every layer is let go of: what is left is 4.127 bits of 32 and less than half a layer.
    left = LAYERS * LAYER_BYTES * 4.127 / 32
    assert start - end > LAYERS * LAYER_BYTES - left - LAYER_BYTES / 2


def test_lora_shares_the_dense_weights() -> None:
    start, peak, end = measure("lora")
    assert max(peak, end) - start < LAYER_BYTES / 10


def test_probe_sees_weights_that_are_kept() -> None:
    """Someone who holds on to the layers keeps them all, and the bound above would fail."""
    start, peak, end = measure("qlora", "keep")
    assert peak - start > LAYER_BYTES
    assert end > start
