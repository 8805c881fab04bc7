"""`lab train`: the same short fine-tune once per format, with the loop of `finetune`.

Each run has a folder of its own, named by its format and by the hash of all that decides its
result. There is the checkpoint that a run killed at any moment goes on from, and its report; a run
that is finished is not repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kernels.finetune.interrupt import Interrupted, StopRequest
from qlora_kernels.finetune.run import run_method
from qlora_kernels.finetune.settings import Settings
from qlora_kernels.formats import register_format
from qlora_kernels.lab.console import say
from qlora_kernels.lab.variants import Variant, axes

RUNS = "runs"
LORA = "lora"
NOTES = (
    "Losses are nats per token on held-out text; before: of the quantized model as it begins.",
    "lora is the same adapters over the dense model: what a format without error would reach.",
    "Every run has the same text in the same order, and the same adapters to begin with.",
    "bits: of the quantized weights; tokens/s: of the training steps alone, on a machine that may "
    "have had other work.",
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """One run: the variant (None: the dense base with adapters) and its report."""

    variant: Variant | None
    report: Mapping[str, Any]

    @property
    def label(self) -> str:
        return LORA if self.variant is None else self.variant.label

    @property
    def row(self) -> dict[str, Any]:
        """The row of the table."""
        columns: dict[str, Any] = {"format": LORA, **dict.fromkeys(axes())}
        if self.variant is not None:
            columns = self.variant.columns
        return {
            **columns,
            "bits": self.report["quantized_bits_per_parameter"],
            "loss before": self.report["eval_loss_before"],
            "loss after": self.report["eval_loss_after"],
            "tokens/s": round(self.report["tokens_per_second"]),
        }


def train_variants(
    variants: Sequence[Variant], settings: Settings, stop: StopRequest
) -> list[Trained]:
    """Train every variant, after the dense base with adapters, in folders below ``settings.out``.

    Args:
        settings: of every run; its method, format and folder are each run's own.

    Raises:
        ArgumentError, CheckpointError, QLKError: as `run_method`.
        Interrupted: ``stop`` was requested; the same command goes on from there.
    """
    chosen: list[Variant | None] = [None, *variants]
    found = []
    for number, variant in enumerate(chosen, start=1):
        trained = Trained(variant, {})
        say(f"train: {number} of {len(chosen)}, {trained.label}")
        try:
            report = run_method(settings_of(settings, variant), stop)
        except Interrupted as stopped:
            message = f"stopped while {trained.label} was trained; the same command goes on"
            raise Interrupted(message, stopped.exit_code - 128) from stopped
        found.append(dataclasses.replace(trained, report=dataclasses.asdict(report)))
    return found


def settings_of(settings: Settings, variant: Variant | None) -> Settings:
    """One run's settings."""
    if variant is None:
        own = dataclasses.replace(settings, method=LORA)
    else:
        own = dataclasses.replace(
            settings,
            method="qlora",
            format=registered(variant),
            double_quant=variant.format.double_quant,
        )
    return dataclasses.replace(
        own, out=settings.out / RUNS / folder_name(own, variant), resume=True
    )


def registered(variant: Variant) -> str:
    """The name that the variant goes by in the registry, where it is entered if it is none of
    those that come with it."""
    if not variant.changes:
        return variant.name
    return register_format(dataclasses.replace(variant.format, name=variant.label)).name


def folder_name(settings: Settings, variant: Variant | None) -> str:
    """Readable, and different for whatever decides the result: a format edited in its file too."""
    decides = [settings.compared_on_resume(), None if variant is None else variant.digest]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    label = LORA if variant is None else variant.label
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', label)}-{digest}"


def curves(trained: Sequence[Trained]) -> dict[str, Mapping[str, Any]]:
    """Label -> losses, as `plots.losses` takes them."""
    return {one.label: one.report for one in trained}


def default_settings(out: Path, **given: Any) -> Settings:
    """Settings of a short run on the embedded model; raises ArgumentError for a bad value."""
    return Settings(method="qlora", out=out, checkpoint_every=10, **given)
