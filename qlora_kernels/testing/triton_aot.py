"""Ahead-of-time compilation of Triton launches for a GPU that is not there, and what the machine
code says: instructions per loop, widths of loads, spills, tensor-core instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qlora_kernels.backends.triton.launch import Launch, kernel_named

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
ALIGNMENT = 16  # Triton's launcher specialises on it: pointers, and integers that are multiples.


@dataclass(frozen=True)
class Loop:
    """One loop of the machine code: mnemonics with their modifiers, and how often each occurs."""

    instructions: Counter[str]

    @property
    def length(self) -> int:
        """Instructions of one iteration of one warp."""
        return sum(self.instructions.values())

    def count(self, prefix: str) -> int:
        """Instructions whose mnemonic begins with `prefix`."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))

    def narrow(self, prefixes: tuple[str, ...], least_bytes: int = 16) -> dict[str, int]:
        """Accesses of fewer bytes a thread, by mnemonic: `("LDG.", "LDGSTS.")` are the loads from
        global memory, into registers and into shared memory, `("STG.",)` the stores to it."""
        return {
            name: n
            for name, n in self.instructions.items()
            if name.startswith(prefixes) and access_bytes(name) < least_bytes
        }


def access_bytes(mnemonic: str) -> int:
    """Bytes per thread of a global memory instruction: `.U8`, `.64`, `.128`; 4 without a width."""
    parts = mnemonic.split(".")
    for width in ("256", "128", "64"):
        if width in parts:
            return int(width) // 8
    if "U8" in parts or "S8" in parts:
        return 1
    if "U16" in parts or "S16" in parts:
        return 2
    return 4


@dataclass(frozen=True)
class Compiled:
    """A compiled launch: Triton's result and its machine code."""

    triton_kernel: Any
    num_warps: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return int(self.triton_kernel.metadata.shared)

    @property
    def ttgir(self) -> str:
        """Triton's GPU-level intermediate code."""
        return str(self.triton_kernel.asm["ttgir"])

    def wgmma_waits(self) -> list[int]:
        """Of every wait for wgmma in a loop that also decodes (gathers from a table, or permutes
        its bytes): how many later products it leaves running. 0 means that nothing overlaps."""
        waits = []
        for _, body in re.findall(
            r"^( *)[^\n]*scf\.for [^\n]*\{\n(.*?)^\1\}", self.ttgir, re.M | re.S
        ):
            if "tt.gather" in body or "prmt.b32" in body:
                waits += [
                    int(n) for n in re.findall(r"warp_group_dot_wait.*pendings = (\d+)", body)
                ]
        return waits

    @cached_property
    def sass(self) -> str:
        """Machine code, disassembled."""
        return self._tool("nvdisasm", "-c")

    @cached_property
    def stack_bytes(self) -> int:
        """Local memory of a thread, spilled registers included."""
        report = self._tool("cuobjdump", "-res-usage")
        match = re.search(r"STACK:(\d+)", report)
        assert match, report
        local = re.search(r"LOCAL:(\d+)", report)
        return int(match.group(1)) + (int(local.group(1)) if local else 0)

    @cached_property
    def instructions(self) -> list[tuple[str, str]]:
        """(mnemonic, operands) of every instruction, in order."""
        return self._parsed[0]

    @cached_property
    def loops(self) -> list[Loop]:
        """Innermost loops, in order."""
        instructions, labels = self._parsed
        spans = []
        for i, (name, operands) in enumerate(instructions):
            target = re.search(r"`\((\.L_\w+)\)", operands) if name.startswith("BRA") else None
            # A branch to itself is the padding after the last instruction.
            if target and labels.get(target.group(1), i) < i:
                spans.append((labels[target.group(1)], i))
        innermost = [
            (a, b)
            for a, b in spans
            if not any(a <= c and d < b for c, d in spans if (c, d) != (a, b))
        ]
        return [Loop(Counter(name for name, _ in instructions[a : b + 1])) for a, b in innermost]

    @property
    def hot_loop(self) -> Loop:
        """The longest loop that reads global memory; without one, the whole kernel."""
        reading = [loop for loop in self.loops if loop.count("LDG")]
        return max(reading, key=lambda loop: loop.length, default=self.everything)

    @property
    def everything(self) -> Loop:
        """All instructions of the kernel."""
        return Loop(Counter(name for name, _ in self.instructions))

    def per_element(self, elements: int) -> float:
        """Instructions of the hot loop per element, for `elements` an iteration of a program."""
        return self.hot_loop.length * self.num_warps * 32 / elements

    @cached_property
    def _parsed(self) -> tuple[list[tuple[str, str]], dict[str, int]]:
        instructions: list[tuple[str, str]] = []
        labels = {}
        for line in self.sass.splitlines():
            label = re.match(r"\s*(\.L_\w+):", line)
            if label:
                labels[label.group(1)] = len(instructions)
                continue
            match = re.match(
                r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line
            )
            if match:
                instructions.append((match.group(1), match.group(2)))
        assert instructions, "the disassembly was not understood"
        return instructions, labels

    def _tool(self, name: str, option: str) -> str:
        """Output of one of the CUDA tools in Triton's wheel on the kernel's cubin."""
        import triton

        assert triton.__file__ is not None
        folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.triton_kernel.asm["cubin"])
            file.flush()
            command = [str(folder / name), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _type_name(value: object, may_be_constant: bool = True) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    if value == 1 and may_be_constant:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _specialize(
    value: object,
    path: tuple[int, ...],
    constants: dict[str | tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], list[list[object]]],
) -> None:
    """What Triton's launcher compiles for: a number that is 1, a pointer or a number that is a
    multiple of 16."""
    if isinstance(value, int) and value == 1:
        constants[path] = 1
    address = value
    if isinstance(value, torch.Tensor):
        address = value.storage_offset() * value.element_size()
    if isinstance(address, int) and address % ALIGNMENT == 0:
        attributes[path] = [["tt.divisibility", ALIGNMENT]]


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for compute capability `capability` (90 is sm_90), as launching it would:
    the same signature, alignment and options. Tensors may be on the meta device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_named(launch.kernel)
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[str | tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    unspecialized = set(kernel.do_not_specialize or ())
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, tuple):
            # Its parts are specialised on whatever the kernel says.
            signature[name] = tuple(_type_name(part) for part in value)
            for index, part in enumerate(value):
                _specialize(part, (position, index), constants, attributes)
        elif name in unspecialized and not isinstance(value, torch.Tensor):
            signature[name] = _type_name(value, may_be_constant=False)
        else:
            signature[name] = _type_name(value)
            _specialize(value, (position,), constants, attributes)
    unknown = set(launch.arguments) - set(signature)
    assert not unknown, f"{launch.kernel} has no {sorted(unknown)}"
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": False,
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    return Compiled(compiled, launch.num_warps)
