"""`python -m qlora_kernels finetune`: its options, their defaults, and what it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora_kernels.errors import QLKError, argument_error
from qlora_kernels.finetune.console import exit_code_of
from qlora_kernels.finetune.interrupt import Relay, StopRequest, stop_on_signals
from qlora_kernels.finetune.optimizers import OPTIMIZERS
from qlora_kernels.finetune.outputs import (
    DEFAULT_OUT,
    OWN_NAMES,
    choose_out,
    comparison_state,
    method_state,
)
from qlora_kernels.finetune.schedule import SCHEDULES
from qlora_kernels.finetune.settings import (
    DTYPES,
    EMBEDDED,
    METHODS,
    PRETRAINED,
    Settings,
    resolve_device,
    resolve_dtype,
)
from qlora_kernels.formats import list_formats

COMPARE = "compare"
SUMMARY = "fine-tune a language model with QLoRA"
DESCRIPTION = """
Fine-tune a causal language model with QLoRA, LoRA or full fine-tuning, or compare the three.
Without options: compare them on the model that comes with this package, which was trained on
Python's documentation, adapted to the source code of the running Python's library. With --model and
QLoRA, every linear layer and mixture of experts but the output layer is quantized while the model
loads, weight by weight; a checkpoint that is quantized already is taken as it is.
"""
EPILOG = """
The output folder gets the adapter in PEFT's layout (after full fine-tuning the model), report.json,
report.md, plots of loss and memory, and a checkpoint; a comparison has one folder a method. Nothing
that another run or another program made is replaced: where such files are, this is an error. The
same command again replaces its own finished results. Ctrl-C saves and stops; a run stopped by it,
or killed, goes on with --resume and ends with the same losses, bit for bit.

Exit status: 0 done, 2 bad arguments, 130 stopped by Ctrl-C, 1 any other failure.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of the command; None where the default depends on others (`all_settings`)."""

    def depends(field: str) -> str:
        return f"default: {getattr(EMBEDDED, field)}, with --model {getattr(PRETRAINED, field)}"

    alphas = f"default: {EMBEDDED.scaling:g} x rank, with --model {PRETRAINED.scaling:g} x rank"
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--model", help="folder or hub id of a causal language model that transformers loads"
    )
    what.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files, or .jsonl files with a `text` field a line; a tenth is held out "
        "(default: the library sources of the running Python)",
    )
    what.add_argument(
        "--method",
        choices=(*METHODS, COMPARE),
        help=f"default: {COMPARE}, with --model qlora",
    )
    base = parser.add_argument_group("quantization of the base weights (qlora)")
    base.add_argument(
        "--format",
        choices=list_formats(),
        metavar="NAME",
        help=f"{', '.join(list_formats())} (default: nf4, or that of a model that is quantized "
        "already)",
    )
    base.add_argument(
        "--block-size", type=int, metavar="N", help="weights per scale (default: the format's)"
    )
    base.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="quantize the scales too (default: yes, or as the model is quantized already)",
    )
    adapter = parser.add_argument_group("adapters (lora, qlora)")
    adapter.add_argument("--rank", type=int, metavar="R", help=depends("rank"))
    adapter.add_argument("--alpha", type=float, help=f"scaling is alpha / rank; {alphas}")
    adapter.add_argument("--dropout", type=float, default=0.0, metavar="P", help="default: 0")
    adapter.add_argument(
        "--targets",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="names of the layers that get adapters, as q_proj v_proj (default: all-linear, which "
        "is all but the output layer)",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr",
        type=float,
        help=f"peak learning rate (default: {EMBEDDED.adapter_lr:g}, full {EMBEDDED.full_lr:g}; "
        f"with --model {PRETRAINED.adapter_lr:g}, full {PRETRAINED.full_lr:g})",
    )
    training.add_argument("--schedule", default="cosine", choices=SCHEDULES, help="default: cosine")
    training.add_argument(
        "--optim",
        default="adamw",
        choices=tuple(OPTIMIZERS),
        help="bitsandbytes' 8-bit and paged ones and torchao's, which keeps its state on the host, "
        "need those packages (default: adamw)",
    )
    training.add_argument("--steps", type=int, metavar="N", help=depends("steps"))
    training.add_argument("--batch", type=int, metavar="N", help=depends("batch"))
    training.add_argument(
        "--seq-len", type=int, metavar="N", help=f"tokens a sequence; {depends('seq_len')}"
    )
    training.add_argument("--seed", type=int, default=0, help="default: 0")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of activations and dense frozen weights; what is trained is fp32 (default: auto, "
        "bfloat16 where the device computes in it, else float32)",
    )
    machine.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N (default: auto, CUDA if there is any)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"default: {DEFAULT_OUT}, or {DEFAULT_OUT}-2 and so on if other runs are there",
    )
    output.add_argument(
        "--resume",
        action="store_true",
        help="continue the run that is in the output folder, or start if there is none",
    )
    output.add_argument(
        "--plan",
        action="store_true",
        help="print the memory that a QLoRA run of --model with these options would take, and stop "
        "(`plan` knows more options)",
    )
    output.add_argument(
        "--card", type=float, metavar="GIB", help="with --plan: say whether it fits so much"
    )
    output.add_argument(
        "--checkpoint-every", type=int, default=50, metavar="N", help="steps (default: 50)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    return exit_code_of(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Run one method or the comparison, write report.md and the plots, print the table.

    Raises the errors that `console.exit_code_of` knows.
    """
    method = arguments.method or ("qlora" if arguments.model else COMPARE)
    if arguments.card is not None:
        raise argument_error("finetune", "--card", "given with --plan", f"{arguments.card:g} alone")
    if method == COMPARE:
        content, out = compare(arguments)
    else:
        content, out = single(arguments, method)
    from qlora_kernels.finetune.plots import write_plots
    from qlora_kernels.finetune.report import text_table, write_markdown

    write_markdown(out, content, write_plots(out, content))
    written = [name for name in (*OWN_NAMES, *METHODS) if (out / name).exists()]
    sys.stdout.write(f"{text_table(content)}\n{out} holds {', '.join(written)}\n")


def compare(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """report.json of a comparison, and the folder it went to."""
    from qlora_kernels.finetune.compare import run_comparison

    def runs(out: Path) -> list[Settings]:
        return [make_settings(arguments, method, out / method) for method in METHODS]

    out = choose_out(arguments.out, arguments.resume, lambda out: comparison_state(out, runs(out)))
    with stop_on_signals(Relay()) as relay:
        return run_comparison(out, runs(out), relay), out


def single(arguments: argparse.Namespace, method: str) -> tuple[dict[str, Any], Path]:
    """report.json of one method, and the folder it went to."""
    from qlora_kernels.finetune.report import document
    from qlora_kernels.finetune.run import run_method

    out = choose_out(
        arguments.out,
        arguments.resume,
        lambda out: method_state(make_settings(arguments, method, out)),
    )
    with stop_on_signals(StopRequest()) as stop:
        report = run_method(make_settings(arguments, method, out), stop)
    return document(method, [report]), out


def plan(arguments: argparse.Namespace, show: Callable[..., int]) -> int:
    """`--plan`: the exit status of ``show``, which is given the model, the card's GiB or None, and
    what `plan_memory` takes of the options."""
    options: list[dict[str, Any]] = []
    status = exit_code_of(lambda: options.append(plan_options(arguments)))
    return status or show(arguments.model, arguments.card, **options[0])


def plan_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """`--plan`: what `plan_memory` takes of the options.

    Raises ArgumentError for a bad value, no --model, or a method that quantizes nothing.
    """
    if arguments.model is None:
        raise argument_error("finetune", "--model", "given with --plan", None)
    if arguments.method not in (None, "qlora"):
        raise argument_error("finetune", "--method", "qlora with --plan", arguments.method)
    settings = make_settings(arguments, "qlora", arguments.out or DEFAULT_OUT)
    return {
        "batch": settings.batch,
        "seq_len": settings.seq_len,
        "rank": settings.rank,
        "dropout": settings.dropout,
        "format": settings.format,
        "block_size": settings.block_size,
        "double_quant": settings.double_quant,
        "dtype": settings.torch_dtype,
        "checkpointing": False,  # a run of this command keeps its activations
        "optimizer": settings.optim,
    }


def stored_defaults(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """What a model that is quantized already says of the options that were not given; nothing of
    one that is dense, or cannot be read, which loading it will say."""
    settled = arguments.format is not None and arguments.double_quant is not None
    if method != "qlora" or arguments.model is None or settled:
        return {}
    from qlora_kernels.finetune.load import stored_quantization

    try:
        stored = stored_quantization(arguments.model)
    except QLKError:
        return {}
    # Of another format than is asked for there is nothing to take.
    other = arguments.format is not None and arguments.format != stored.get("format")
    return {} if other else stored


def make_settings(arguments: argparse.Namespace, method: str, out: Path) -> Settings:
    """The options of one method, defaults filled in. Raises ArgumentError for a bad value."""
    defaults = PRETRAINED if arguments.model else EMBEDDED

    def given(name: str, default: Any) -> Any:
        value = getattr(arguments, name)
        return default if value is None else value

    device = resolve_device(arguments.device)
    rank = given("rank", defaults.rank)
    stored = stored_defaults(arguments, method)
    lr = defaults.full_lr if method == "full" else defaults.adapter_lr
    return Settings(
        method=method,
        out=out,
        model=arguments.model,
        data=tuple(arguments.data),
        format=given("format", stored.get("format", Settings.format)),
        block_size=arguments.block_size,
        double_quant=given("double_quant", stored.get("double_quant", Settings.double_quant)),
        rank=rank,
        alpha=given("alpha", defaults.scaling * rank),
        dropout=arguments.dropout,
        targets=tuple(arguments.targets),
        lr=given("lr", lr),
        schedule=arguments.schedule,
        optim=arguments.optim,
        steps=given("steps", defaults.steps),
        batch=given("batch", defaults.batch),
        seq_len=given("seq_len", defaults.seq_len),
        dtype=resolve_dtype(arguments.dtype, torch.device(device)),
        device=device,
        seed=arguments.seed,
        resume=arguments.resume,
        checkpoint_every=arguments.checkpoint_every,
    )
