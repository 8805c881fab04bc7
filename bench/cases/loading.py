"""loading: host memory while a sharded checkpoint is quantized on its way in.

A fresh process loads it. What counts is anonymous memory above what the process held before,
sampled each millisecond; the checkpoint's own pages are mapped from the file and the system may
drop them at any time. It may hold the quantized model and one shard.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu.large import config_for
from bench.gpu.llama import Sizes
from bench.records import BytesRow, Settings

ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(8192, 1024, 2816, 12, 16, 16)
TINY = Sizes(64, 64, 128, 1, 2, 2)
SHARDS = 8
# Loads before the measured one: the imports and pools that any load makes are not the model's.
CHILD = """
import json, re, sys, threading, time, torch, transformers
import qlora_kernels as qlk
from qlora_kernels.testing.timing import release_free_memory
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=qlk.QLoRAKernelsConfig(format="nf4")
    )

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(1e-3)

load(sys.argv[1])
release_free_memory()
before, seen, done = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2])
done.set()
watcher.join()
held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
print(json.dumps({"peak": max(seen) - before, "model": held, "samples": len(seen)}))
"""


def case_loading(settings: Settings, sizes: Sizes = SIZES) -> list[BytesRow]:
    """A bf16 checkpoint in eight shards; needs transformers and accelerate."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("tiny", "model")]
        for path, chosen in zip(paths, (TINY, sizes), strict=True):
            save(path, chosen)
        shard = max(file.stat().st_size for file in paths[1].glob("*.safetensors"))
        whole = sum(file.stat().st_size for file in paths[1].glob("*.safetensors"))
        found = measured(*paths)
    allowed = found["model"] + shard
    note = f"model {found['model'] / 2**20:.0f} MiB, shard {shard / 2**20:.0f} MiB"
    work = "host memory while loading and quantizing"
    return [
        BytesRow(work, "quantized model + one shard", found["peak"], allowed, 1.0, note),
        BytesRow(work, "the checkpoint", found["peak"], whole),
    ]


def save(path: Path, sizes: Sizes) -> None:
    """A checkpoint of random weights in about `SHARDS` files."""
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config_for(sizes)).to(torch.bfloat16)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(path, max_shard_size=whole // SHARDS)


def measured(*paths: Path) -> dict[str, int]:
    """What a fresh process held at most, and what the model takes."""
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
