"""Imports and includes go one way, and no file outgrows its reader.

    formats -> reference -> backends -> ops -> autograd -> nn -> {integrations, finetune, lab}
    -> cli
    csrc/include -> csrc/kernels, csrc/kernels_cpu -> csrc/bindings

A module imports from its own folder and from layers to its left; SIDEWAYS names the exceptions.
`errors.py`, `env.py` and `files.py` are open to all; `testing/` serves tests and benches only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "qlora_kernels"
MAX_LINES = 400
# Path -> why this file may be longer.
LONG_FILES: dict[str, str] = {}

# The package's own folders and files by rank; "" is qlora_kernels/__init__.py, the public names.
LAYERS: list[set[str]] = [
    {"errors", "env", "files"},
    {"formats"},
    {"reference"},
    {"backends"},
    {"ops"},
    {"autograd"},
    {"nn"},
    {""},
    {"integrations", "finetune", "lab", "info", "testing"},
    {"cli"},
    {"__main__"},
]
# Arrows between units of one layer -> why.
SIDEWAYS = {("lab", "finetune"): "`lab train` is the loop of `finetune`, once per format"}
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
CXX_FOLDERS = {"include": 0, "kernels": 1, "kernels_cpu": 1, "bindings": 2}


def unit_of(module: str) -> str:
    """The layer unit of a dotted module: qlora_kernels.formats.nf4 -> formats."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of each import of the package, also of those in functions."""
    parts = path.relative_to(root).with_suffix("").parts
    package = list(parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base and base[0] == PACKAGE:
                for alias in node.names:
                    # `from qlora_kernels import env` names a module, not something __init__ holds.
                    child = root.joinpath(*base, alias.name)
                    is_module = child.is_dir() or child.with_suffix(".py").exists()
                    yield node.lineno, ".".join([*base, alias.name] if is_module else base)


def import_violations(root: Path) -> list[str]:
    """Imports against an arrow, `file:line: importer imports imported`."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        importer = "" if parts == ("__init__",) else parts[0]
        if importer not in RANK:
            found.append(f"{relative}: {importer} has no layer; name one in LAYERS")
            continue
        for line, module in imported_modules(path, root):
            imported = unit_of(module)
            along = imported != "testing" and RANK.get(imported, len(LAYERS)) < RANK[importer]
            allowed = imported == importer or along or (importer, imported) in SIDEWAYS
            if not allowed:
                found.append(f"{relative}:{line}: {importer or PACKAGE} imports {module}")
    return found


def include_violations(root: Path) -> list[str]:
    """Includes against an arrow; torch below bindings; any torch header off the stable ABI."""
    found = []
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        relative = path.relative_to(root).as_posix()
        folder = path.relative_to(root / "csrc").parts[0]
        if folder not in CXX_FOLDERS:
            found.append(f"{relative}: csrc/{folder} has no layer; name one in CXX_FOLDERS")
            continue
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r'^\s*#\s*include\s*([<"])([^>"]+)', text, re.M):
            quote, target = match.groups()
            line = text.count("\n", 0, match.start(2)) + 1
            is_torch = target.split("/")[0] in ("torch", "ATen", "c10")
            stable = target.startswith(
                ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/", "torch/headeronly/")
            )
            if is_torch and not (folder == "bindings" and stable):
                found.append(f"{relative}:{line}: includes {target}")
            beside = "/" not in target and (path.parent / target).exists()
            if quote == '"' and not (target.startswith("qlk/") or beside or is_torch):
                found.append(f"{relative}:{line}: includes {target}, neither qlk/ nor beside it")
    return found


def length_violations(root: Path, exempt: dict[str, str]) -> list[str]:
    """Files of MAX_LINES lines or more that are not listed, and listed ones that need not be."""
    lines = {}
    for folder in (PACKAGE, "csrc", "tests", "bench", "tools"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                relative = path.relative_to(root).as_posix()
                lines[relative] = path.read_bytes().count(b"\n")
    found = [
        f"{path}: {count} lines, the limit is {MAX_LINES}"
        for path, count in sorted(lines.items())
        if count >= MAX_LINES and path not in exempt
    ]
    stale = [path for path in exempt if lines.get(path, 0) < MAX_LINES]
    return found + [f"{path}: listed in LONG_FILES without need" for path in stale]


def test_imports_follow_the_layers() -> None:
    assert import_violations(ROOT) == []


def test_includes_follow_the_layers() -> None:
    assert include_violations(ROOT) == []


def test_files_stay_short() -> None:
    assert length_violations(ROOT, LONG_FILES) == []


def write(root: Path, relative: str, text: str) -> None:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("relative", "statement", "imported"),
    [
        ("formats/nf4.py", "from qlora_kernels.reference import dequantize", "reference"),
        ("formats/nf4.py", "from ..ops import checks", "ops"),
        ("formats/nf4.py", "import qlora_kernels", ""),
        ("ops/quantize.py", "def f():\n    import qlora_kernels.nn.adapter", "nn"),
        ("finetune/loop.py", "from qlora_kernels.lab import sweep", "lab"),
        ("lab/train.py", "from qlora_kernels.integrations import peft", "integrations"),
        ("nn/adapter.py", "from qlora_kernels.testing import errors", "testing"),
        ("info.py", "from qlora_kernels import testing", "testing"),
        ("env.py", "from qlora_kernels.formats import nf4", "formats"),
        ("surprise/new.py", "import qlora_kernels.formats", "surprise has no layer"),
    ],
)
def test_import_against_an_arrow_is_found(
    tmp_path: Path, relative: str, statement: str, imported: str
) -> None:
    write(tmp_path, f"{PACKAGE}/testing/__init__.py", "")
    write(tmp_path, f"{PACKAGE}/ops/checks.py", "")
    write(tmp_path, f"{PACKAGE}/{relative}", statement + "\n")
    violations = import_violations(tmp_path)
    assert len(violations) == 1
    assert imported in violations[0]


def test_imports_along_the_arrows_pass(tmp_path: Path) -> None:
    write(tmp_path, f"{PACKAGE}/env.py", "")
    write(tmp_path, f"{PACKAGE}/formats/nf4.py", "from .codebook import Codebook")
    write(tmp_path, f"{PACKAGE}/ops/quantize.py", "from qlora_kernels import env, errors, formats")
    write(tmp_path, f"{PACKAGE}/errors.py", "import torch")
    write(tmp_path, f"{PACKAGE}/cli.py", "import qlora_kernels as qlk\nfrom .finetune import run")
    assert import_violations(tmp_path) == []


@pytest.mark.parametrize(
    ("relative", "include"),
    [
        ("include/qlk/types.h", "<torch/csrc/stable/tensor.h>"),
        ("kernels_cpu/quantize.cpp", "<ATen/Parallel.h>"),
        ("kernels/quantize.cu", '"../bindings/checks.h"'),
        ("bindings/quantize.cpp", "<torch/extension.h>"),
        ("include/qlk/types.h", '"kernels_cpu/decode.h"'),
    ],
)
def test_include_against_an_arrow_is_found(tmp_path: Path, relative: str, include: str) -> None:
    write(tmp_path, f"csrc/{relative}", f"#include <cstdint>\n#include {include}\n")
    violations = include_violations(tmp_path)
    assert len(violations) == 1
    assert f"csrc/{relative}:2" in violations[0]


def test_long_file_is_found(tmp_path: Path) -> None:
    write(tmp_path, "tests/test_endless.py", "x = 1\n" * MAX_LINES)
    assert len(length_violations(tmp_path, {})) == 1
    assert length_violations(tmp_path, {"tests/test_endless.py": "a table"}) == []
    assert length_violations(tmp_path, {"tests/test_endless.py": "a table", "gone.py": "x"}) != []
