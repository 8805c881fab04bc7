"""The bans of .pre-commit-config.yaml catch what they are for, and let the neighbours through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML comes with pre-commit, in the dev extra")

CONFIG = yaml.safe_load(
    (Path(__file__).resolve().parents[1] / ".pre-commit-config.yaml").read_text(encoding="utf-8")
)
BANS = {
    hook["id"]: hook
    for repo in CONFIG["repos"]
    for hook in repo["hooks"]
    if hook["language"] == "pygrep"
}
NF4_VALUE = "-0.6961928009986877"

# Ban -> (lines it must catch, lines it must let through).
SAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "ban-torch-in-kernels": (
        ["#include <torch/csrc/stable/tensor.h>", '#  include "ATen/ATen.h"', "#include <c10/x.h>"],
        ["#include <cstdint>", '#include "qlk/types.h"', "// torch's own pool"],
    ),
    "ban-unstable-torch": (
        ["#include <ATen/Parallel.h>", "#include <torch/extension.h>", "#include <torch/all.h>"],
        ["#include <torch/csrc/stable/library.h>", "#include <torch/headeronly/version.h>"],
    ),
    "ban-fast-math": (["-ffast-math", "-Ofast", "--use_fast_math"], ["-fno-math-errno", "-O3"]),
    "ban-except-exception": (
        [
            "except Exception:",
            "except Exception as error:",
            "except:",
            "except (Exception, OSError):",
            "except (OSError, Exception):",
        ],
        [
            "except BaseException:",
            "except (ExceptionGroup, OSError) as error:",
            "except ValueError:",
        ],
    ),
    "ban-make-block-ptr": (["tl.make_block_ptr(x)"], ["tl.make_tensor_descriptor(x)"]),
    "ban-bare-value-error": (
        ["raise ValueError", "raise ValueError()", "raise TypeError  # why", "raise RuntimeError"],
        ['raise ValueError("M must be …")', "raise argument_error(op)", "raise", "raise error"],
    ),
    "ban-second-nf4-table": ([NF4_VALUE, NF4_VALUE[:10] + "f,"], ["0.6962", "0.5250730514526367"]),
    "ban-open-ends": (
        ["# TODO: later", "// FIXME", "raise NotImplementedError"],
        ["return NotImplemented", "todos = []"],
    ),
}


def test_every_ban_has_samples() -> None:
    assert set(SAMPLES) == set(BANS)


@pytest.mark.parametrize("ban", SAMPLES)
def test_ban_catches(ban: str) -> None:
    for line in SAMPLES[ban][0]:
        assert re.search(BANS[ban]["entry"], line), line


@pytest.mark.parametrize("ban", SAMPLES)
def test_ban_lets_through(ban: str) -> None:
    for line in SAMPLES[ban][1]:
        assert not re.search(BANS[ban]["entry"], line), line


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("qlora_kernels/formats/nf4.py", True),
        ("csrc/include/qlk/codebooks_generated.h", True),
        ("qlora_kernels/formats/fp4.py", False),
        ("tests/formats/test_nf4.py", False),
    ],
)
def test_nf4_table_has_one_home(path: str, allowed: bool) -> None:
    assert bool(re.search(BANS["ban-second-nf4-table"]["exclude"], path)) is allowed
