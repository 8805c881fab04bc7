"""Machine code of a CUDA source for one target: the account of registers and spills, and the
instructions of each kernel by basic block and loop."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.native_library import built_object

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def disassembler() -> str | None:
    """nvdisasm, or None."""
    return _tool("nvdisasm")


def _tool(name: str) -> str | None:
    """Of the CUDA toolkit, or of Triton's wheel, which brings some."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    triton = importlib.util.find_spec("triton")
    if found or triton is None or triton.origin is None:
        return found
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(beside) if beside.exists() else None


def compile_cubin(source: Path, arch: str, cubin: Path) -> subprocess.CompletedProcess[str]:
    """Compiles one source; the output holds ptxas's account of each kernel."""
    assert NVCC is not None
    command = [NVCC, "-std=c++20", "-O3", "-Werror=all-warnings", "-Xptxas=-v", "-cubin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", '-DQLK_CUDA_ARCHS=""']
    command += [f"-I{ROOT / 'csrc' / 'include'}", str(source), "-o", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel (its mangled name); spilled: stack or local memory in use."""

    kernel: str
    registers: int
    spilled: bool


def usages(report: str) -> list[Usage]:
    """ptxas's account, kernel by kernel."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, part
        spilled = re.search(
            r"\b[1-9]\d* bytes (stack frame|spill stores|spill loads)|bytes lmem", part
        )
        found.append(Usage(part.split("'")[0], int(registers.group(1)), bool(spilled)))
    return found


def usages_of(cubin: Path) -> list[Usage]:
    """cuobjdump's account, kernel by kernel: the same, of code that is there."""
    tool = _tool("cuobjdump")
    assert tool is not None
    done = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accounts = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", done.stdout)
    return [
        Usage(name, int(registers), int(stack) > 0 or int(local) > 0)
        for name, registers, stack, local in accounts
    ]


@dataclass(frozen=True)
class Code:
    """A source's code for one target; `said`: by the compilers."""

    said: str
    usages: list[Usage]
    cubin: Path


def code_of_source(source: Path, arch: str, folder: Path) -> Code:
    """From the object of the build where it is of this source and has the target, as most of the
    time goes into compiling; otherwise compiled, without optimizing less."""
    tool, made = _tool("cuobjdump"), built_object(source, arch)
    if tool is None or made is None:
        cubin = folder / f"{source.stem}-{arch}.cubin"
        done = compile_cubin(source, arch, cubin)
        assert done.returncode == 0, done.stderr
        return Code(done.stderr, usages(done.stderr), cubin)
    extracted = folder / f"{made.stem}-{arch}"
    extracted.mkdir()
    name = f".sm_{arch}."
    subprocess.run([tool, "-xelf", name, str(made)], cwd=extracted, check=True, capture_output=True)
    (cubin,) = extracted.iterdir()
    said = made.with_suffix(".log").read_text()
    assert "warning" not in said, said
    return Code(said, usages_of(cubin), cubin)


@dataclass(frozen=True)
class Kernel:
    """Machine code of one kernel: mnemonics with modifiers, and where its basic blocks begin."""

    name: str
    mnemonics: tuple[str, ...]
    blocks: tuple[Counter[str], ...]
    loops: tuple[Counter[str], ...]

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic matches."""
        return sum(bool(re.match(pattern, name)) for name in self.mnemonics)

    def blocks_with(self, pattern: str) -> Counter[str]:
        """The instructions of all basic blocks that contain a match."""
        return sum((b for b in self.blocks if matches(b, pattern)), Counter[str]())

    def loop_with(self, pattern: str, count: int) -> Counter[str]:
        """The shortest loop with at least that many matches."""
        found = [loop for loop in self.loops if matches(loop, pattern) >= count]
        assert found, f"{self.name} has no loop with {count} x {pattern}"
        return min(found, key=lambda loop: sum(loop.values()))


def matches(instructions: Counter[str], pattern: str) -> int:
    """Instructions whose mnemonic matches."""
    return sum(n for name, n in instructions.items() if re.match(pattern, name))


def disassemble(cubin: Path) -> list[Kernel]:
    """All kernels of a cubin."""
    tool = disassembler()
    assert tool is not None
    command = [tool, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = []
    for part in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        kernels.append(_parse(part.split(":")[0], part))
    assert kernels, "the disassembly was not understood"
    return kernels


def _parse(name: str, text: str) -> Kernel:
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label.group(1)] = len(instructions)
            continue
        match = re.match(
            r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line
        )
        if match:
            instructions.append((match.group(1), match.group(2)))
    mnemonics = tuple(mnemonic for mnemonic, _ in instructions)
    starts, spans = {0, *labels.values()}, []
    for i, (mnemonic, operands) in enumerate(instructions):
        if mnemonic.startswith(("BRA", "EXIT", "RET")):
            starts.add(i + 1)
        target = re.search(r"`\((\.L_\w+)\)", operands) if mnemonic.startswith("BRA") else None
        # A branch to itself is the padding after the last instruction.
        if target and labels.get(target.group(1), i) < i:
            spans.append((labels[target.group(1)], i))
    edges = [*sorted(start for start in starts if start < len(mnemonics)), len(mnemonics)]
    blocks = tuple(Counter(mnemonics[a:b]) for a, b in itertools.pairwise(edges))
    loops = tuple(Counter(mnemonics[a : b + 1]) for a, b in spans)
    return Kernel(name, mnemonics, blocks, loops)
