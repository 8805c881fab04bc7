"""Importing the package is cheap: no CUDA context, no import of anything optional."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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


REGISTRATION = """
import importlib, sys
import qlora_kernels
def awaiting():
    return [finder for finder in sys.meta_path if "qlora_kernels" in type(finder).__module__]
assert len(awaiting()) == 1 and "transformers" not in sys.modules
importlib.reload(qlora_kernels)
assert len(awaiting()) == 1
importlib.util.find_spec("transformers.modeling_utils")  # looked for, and not imported
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known
loader = transformers.modeling_utils.__spec__.loader
assert "qlora_kernels" in known and not awaiting()
assert loader is transformers.modeling_utils.__loader__
assert "qlora_kernels" not in type(loader).__module__
# The other order: transformers is there, the package comes.
known.clear()
for name in [name for name in sys.modules if name.startswith("qlora_kernels.integrations.")]:
    del sys.modules[name]
importlib.reload(qlora_kernels)
assert "qlora_kernels" in known and not awaiting()
"""


def test_transformers_knows_the_quantizer_whichever_is_imported_first() -> None:
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason="in the hf extra")
    subprocess.run([sys.executable, "-c", REGISTRATION], check=True)
