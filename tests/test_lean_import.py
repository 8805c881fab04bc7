"""Importing the package is cheap: no CUDA context, no import of anything optional."""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONAL = ("transformers", "peft", "matplotlib", "bitsandbytes", "torchao", "triton", "datasets")

PROBE = f"""
import json, sys
STATEMENT
import torch
print(json.dumps({{
    "loaded": [name for name in {OPTIONAL!r} if name in sys.modules],
    "cuda": torch.cuda.is_initialized(),
}}))
"""


def probe(statement: str) -> dict[str, object]:
    command = [sys.executable, "-c", PROBE.replace("STATEMENT", statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_import_leaves_cuda_and_optional_packages_alone() -> None:
    # torch itself may bring some (triton); only what the package adds counts.
    torch_alone = probe("import torch")
    package = probe("import qlora_kernels")
    assert package["cuda"] is False
    assert package["loaded"] == torch_alone["loaded"]


def test_command_line_leaves_optional_packages_alone() -> None:
    assert probe("import qlora_kernels.cli")["loaded"] == probe("import torch")["loaded"]


def test_probe_sees_an_optional_import() -> None:
    assert probe("import matplotlib")["loaded"] == ["matplotlib"]
