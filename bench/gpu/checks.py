"""Stages that show that the kernels are right on this machine, before any is timed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import torch

from bench.gpu import driver
from bench.gpu.context import Context
from bench.grid.peers import FAILURES, PeerMissing, first_line, load
from bench.machine import machine_record
from qlora_kernels import info
from qlora_kernels.backends.registry import entries
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.tolerances import assert_qlora, assert_qlora_backward
from tests.triton.checks import problem_on, random_problem

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("bitsandbytes", "peft", "transformers", "torchao.quantization", "triton", "pytest")
TOOLS = ("nvidia-smi", "nvcc", "ncu", "nsys", "compute-sanitizer")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
RANDOM_PROBLEMS, SMOKE_PROBLEMS = 10_000, 6


def environment(context: Context) -> None:
    """The machine, the driver, versions, and what is missing of peers and tools."""
    context.save(machine=machine_record(torch.get_num_threads(), context.device))
    peers = {}
    for name in PEERS:
        try:
            load(name)
            peers[name] = "loads"
        except PeerMissing as error:
            peers[name] = f"missing: {error}"
    tools = {name: shutil.which(name) or "missing" for name in TOOLS}
    context.save(info=info.render(), peers=peers, tools=tools)
    if tools["nvidia-smi"] != "missing":
        done = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, check=False)
        (context.out / "nvidia-smi.txt").write_text(done.stdout + done.stderr, encoding="utf-8")


def tests(context: Context) -> None:
    """`pytest -m gpu tests/gpu`, with every failure by name.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    try:
        load("pytest")
    except PeerMissing as error:
        context.save(missing=str(error))
        return
    report = context.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q"]
    # Plugins that the project's own options name may be missing here.
    command += ["-o", "addopts=--import-mode=importlib"]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
    log = context.out / "pytest.log"
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=context.left
            ).returncode
        except subprocess.TimeoutExpired:
            context.save(error="out of time; pytest.log shows how far it came")
            raise
    context.save(exit_status=code, **counts(report))
    assert code in (0, 5) if context.smoke else code == 0, f"pytest ended with {code}"
    assert context.smoke or context.content["passed"], "no test ran"


def counts(report: Path) -> dict[str, Any]:
    """Tests of a JUnit file by outcome, and the failed ones by name with their messages."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
    if not report.exists():
        return found
    for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [node for node in case if node.tag in ("failure", "error")]
        if wrong:
            name = f"{case.get('classname')}::{case.get('name')}"
            found["failures"][name] = (wrong[0].get("message") or "")[:500]
            found["failed"] += 1
        elif case.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found


def sanitizer(context: Context) -> None:
    """compute-sanitizer's tools over the driver; in a smoke run the driver alone.

    Raises:
        AssertionError: a tool found something.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None and not context.smoke:
        context.save(missing="compute-sanitizer is not on PATH")
        return
    found: dict[str, Any] = dict(context.content.get("tools", {}))
    names = SANITIZERS if not context.smoke else ("none",)
    for number, name in enumerate(names):
        if name in found:
            continue
        command = [sys.executable, "-m", "bench.gpu.driver", "--few"]
        command += ["--device", context.device.type]
        command += ["--backend", "all" if context.device.type == "cuda" else "auto"]
        if not context.smoke:
            assert tool is not None
            command = [tool, f"--tool={name}", "--error-exitcode=66", *command]
        seconds = max(10.0, context.left / (len(names) - number))
        # Without it the sanitizers see one large block where torch's allocator hands out parts.
        variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        log = context.out / f"sanitizer-{name}.log"
        with log.open("wb") as output:
            try:
                code: int | str = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=variables,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
        end = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        found[name] = {"exit_status": code, "end": end}
        context.save(tools=found)
    wrong = [name for name, tool in found.items() if tool["exit_status"] not in (0, "out of time")]
    assert not wrong, f"found something: {', '.join(wrong)}; see sanitizer-*.log"


def poison(context: Context) -> None:
    """Every op with fresh memory full of NaN.

    Raises:
        AssertionError: an op left part of its result unwritten, or is wrong otherwise.
    """
    run, wrong = 0, {}
    backends = ("all",) if context.device.type == "cuda" else ("auto",)
    dtypes = ("bf16",) if context.smoke else ("bf16", "fp16", "fp32")
    for point in driver.points(context.device, backends, dtypes, few=context.smoke):
        if context.left < 0:
            break
        run += 1
        try:
            driver.poisoned(lambda point=point: driver.check(point, context.device))
        except (AssertionError, *FAILURES) as error:
            wrong[point.key] = first_line(error)
        if wrong or run % 100 == 0:
            context.save(run=run, wrong=wrong)
    context.save(run=run, wrong=wrong)
    assert run and not wrong, f"{len(wrong)} of {run} wrong, the first: {next(iter(wrong), None)}"


def matmul_backends(device: torch.device) -> list[str]:
    """Backends that can run on the device, without the reference; of a CPU's the best."""
    chosen = []
    for entry in entries("qlora_linear"):
        family = entry.backend.split(":")[0]
        here = ("triton", "cuda") if device.type == "cuda" else ("cpu",)
        if family in here and entry.available() is None:
            chosen.append(entry.backend)
    return chosen if device.type == "cuda" else chosen[:1]


def random_problems(context: Context) -> None:
    """Random sizes, formats, dtypes and options against fp64, each on every backend; goes on where
    it stopped.

    Raises:
        AssertionError: a problem came out wrong; all that did are in the record.
    """
    total = SMOKE_PROBLEMS if context.smoke else RANDOM_PROBLEMS
    done = int(context.content.get("done", 0))
    wrong: dict[str, str] = dict(context.content.get("wrong", {}))
    backends = matmul_backends(context.device)
    context.save(wanted=total, backends=backends, done=done, wrong=wrong)
    while done < total and context.left > 0:
        for name in backends:
            try:
                one_problem(done, name, context.device)
            except (AssertionError, *FAILURES) as error:
                wrong[f"seed {done}, {name}"] = first_line(error)
        done += 1
        if done % 200 == 0 or done == total:
            context.save(done=done, wrong=wrong)
    context.save(done=done, wrong=wrong)
    assert backends, "no backend can run here"
    assert not wrong, f"{len(wrong)} of {done} wrong, the first: {next(iter(wrong))}"


def one_problem(seed: int, backend: str, device: torch.device) -> None:
    """Raises AssertionError where forward, backward or dequantize are wrong."""
    p = problem_on(device, random_problem(seed))
    kernels = {}
    for op in ("qlora_linear", "qlora_linear_backward", "dequantize"):
        kernels[op] = next(e for e in entries(op) if e.backend == backend).fn
    y, xa = kernels["qlora_linear"](
        p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, p.dropout_p, p.seed
    )
    assert_qlora(y, xa, p)
    gradients = kernels["qlora_linear_backward"](
        p.grad_y, p.x, xa, p.weight, p.lora_a, p.lora_b, p.scaling, p.dropout_p, p.seed
    )
    assert_qlora_backward(gradients, p)
    reference = next(e for e in entries("dequantize") if e.backend == "reference").fn
    arguments = (p.weight, p.weight.shape, p.x.dtype)
    assert_bitwise_equal(kernels["dequantize"](*arguments), reference(*arguments))
