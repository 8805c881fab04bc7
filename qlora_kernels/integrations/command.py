"""`python -m qlora_kernels convert` and `plan`: their options, and what they run."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch

from qlora_kernels.errors import ArgumentError, ArgumentTypeError, QLKError, argument_error
from qlora_kernels.formats import list_formats
from qlora_kernels.integrations.optional import require

SUMMARY = "convert a checkpoint between dense, this library's and bitsandbytes' files"
DESCRIPTION = """
Convert a folder that transformers' save_pretrained wrote: quantize it (or turn one kind of 4-bit
files into the other, without touching a code), or make it dense, with an adapter added if one is
given. A file of the result is in memory at a time; nothing is visible under DST before all of it is
there, and the same command goes on after an interruption.
"""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


PLAN_SUMMARY = "the memory of a fine-tuning run, before there is a run"


def _scale_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="weights per scale (default: the format's)"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="quantize the scales too (default: the format's)",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of the command."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder")
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    parser.add_argument(
        "--to",
        default="qlora_kernels",
        choices=("qlora_kernels", "bitsandbytes", "dense"),
        help="default: qlora_kernels",
    )
    parser.add_argument(
        "--format",
        choices=list_formats(),
        metavar="NAME",
        help=f"for a dense SRC: {', '.join(list_formats())} (default: nf4)",
    )
    _scale_arguments(parser)
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="NAME", help="modules that stay dense"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=sorted(DTYPES),
        help="of a dense result (default: bfloat16)",
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="a LoRA adapter to add; its weights are quantized anew"
    )
    parser.add_argument(
        "--shard-size", type=float, default=2.0, metavar="GIB", help="of a file (default: 2)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def main(arguments: argparse.Namespace) -> int:
    """Convert; 0, or 2 for bad arguments, 130 for Ctrl-C, 1 for any other failure."""
    try:
        require("transformers", "convert")
        from qlora_kernels.integrations.convert import convert_checkpoint

        path = convert_checkpoint(
            arguments.source,
            arguments.destination,
            to=arguments.to,
            format=arguments.format,
            block_size=arguments.block_size,
            double_quant=arguments.double_quant,
            skip=arguments.skip,
            dtype=DTYPES[arguments.dtype],
            adapter=arguments.adapter,
            shard_bytes=_bytes_of(arguments.shard_size),
            progress=not arguments.quiet,
        )
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on", 130)
    except (ArgumentError, ArgumentTypeError) as error:
        return _fail(str(error), 2)
    except (QLKError, OSError, ImportError) as error:
        return _fail(str(error), 1)
    sys.stdout.write(f"{path}\n")
    return 0


def _bytes_of(shard_size: float) -> int:
    if not 0 < shard_size < math.inf:
        raise argument_error("convert", "--shard-size", "a number above 0", shard_size)
    return math.ceil(shard_size * 2**30)


def _fail(message: str, code: int) -> int:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return code


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Every option of `plan`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="llama-7b, -13b, -33b, -65b, llama-3-8b, -70b, or a folder or hub id with a config",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="every built-in size, beside what the QLoRA paper says of it, as Markdown",
    )
    for name, default, what in (
        ("--batch", 1, "sequences a step"),
        ("--seq-len", 512, "tokens each"),
        ("--rank", 64, "of the adapters"),
    ):
        help_text = f"{what} (default: {default})"
        parser.add_argument(name, type=int, default=default, metavar="N", help=help_text)
    parser.add_argument(
        "--format",
        default="nf4",
        choices=list_formats(),
        metavar="NAME",
        help=f"{', '.join(list_formats())} (default: nf4)",
    )
    _scale_arguments(parser)
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=sorted(DTYPES),
        help="of activations and of what stays dense (default: bfloat16)",
    )
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute activations in the backward (default: yes)",
    )
    parser.add_argument(
        "--optim", default="adamw", metavar="NAME", help="as of finetune (default: adamw)"
    )
    parser.add_argument("--card", type=float, metavar="GIB", help="say whether it fits so much")


def plan_main(arguments: argparse.Namespace) -> int:
    """Print the plan, or the table of them; the exit status is that of `show_plan`."""
    options = {
        "batch": arguments.batch,
        "seq_len": arguments.seq_len,
        "rank": arguments.rank,
        "format": arguments.format,
        "block_size": arguments.block_size,
        "double_quant": arguments.double_quant,
        "dtype": DTYPES[arguments.dtype],
        "checkpointing": arguments.checkpointing,
        "optimizer": arguments.optim,
    }
    if (arguments.model is None) != arguments.table:
        return _fail("plan: give either MODEL or --table", 2)
    return show_plan(arguments.model, arguments.card, **options)


def show_plan(model: str | None, card: float | None, **options: Any) -> int:
    """Print what `plan_memory` says of a model, or without one the table of all built-in sizes.

    Returns:
        0; 1 if it does not fit ``card`` GiB or cannot be made; 2 for bad arguments.
    """
    try:
        require("transformers", "plan")
        from qlora_kernels.integrations.plan import config_of, plan_memory
        from qlora_kernels.integrations.plan_table import plan_table

        if model is None:
            sys.stdout.write(f"{plan_table(**options)}\n")
            return 0
        plan = plan_memory(config_of(model), **options)
    except (ArgumentError, ArgumentTypeError) as error:
        return _fail(str(error), 2)
    except (QLKError, OSError, ImportError) as error:
        return _fail(str(error), 1)
    sys.stdout.write(f"{plan}\n")
    if card is None:
        return 0
    fits = plan.total <= card * 2**30
    sys.stdout.write(f"{'fits' if fits else 'does not fit'} {card:g} GiB\n")
    return 0 if fits else 1
