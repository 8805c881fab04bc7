"""Learning rates of the fine-tuning demo: each method's held-out loss over a grid.

    python -m bench.finetune_sweep [--methods full lora qlora] [--factors 0.5 1 2] [--seeds 0]
        [-- OPTION of `finetune` …]

Every run is the demo's, but for its learning rate: the default of its method times a factor. What
is best here are the defaults in `qlora_kernels/finetune/settings.py`. A run takes as long as a
method of the demo, so the default grid takes three times the demo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qlora_kernels.finetune.settings import EMBEDDED, METHODS


def held_out_loss(method: str, lr: float, seed: int, options: Sequence[str]) -> float:
    """Held-out loss after one run, nats per token."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qlora_kernels", "finetune", "--method", method]
        command += ["--lr", repr(lr), "--seed", str(seed), "--out", folder, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    loss: float = report["methods"][method]["eval_loss_after"]
    return loss


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sweep the demo's learning rates.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("options", nargs="*", help="after --: options of `finetune`")
    given = parser.parse_args(arguments)
    print(f"{'method':8}{'lr':>10}  held-out loss of each seed")
    for method in given.methods:
        default = EMBEDDED.full_lr if method == "full" else EMBEDDED.adapter_lr
        for factor in given.factors:
            lr = float(f"{default * factor:.3g}")
            losses = [held_out_loss(method, lr, seed, given.options) for seed in given.seeds]
            shown = "  ".join(f"{loss:.4f}" for loss in losses)
            print(f"{method:8}{lr:10.2g}  {shown}", flush=True)


if __name__ == "__main__":
    main()
