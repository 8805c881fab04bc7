"""What a stage is given: device, time, its earlier results, and a way to keep new ones at once."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.records import write_json


@dataclass
class Context:
    """One run of one stage.

    Attributes:
        stage: its name.
        device: what to run on.
        smoke: tiny shapes, to test the machinery itself; nothing measured means anything.
        out: folder of the results.
        seconds: time it may take; work is to be chosen so that it ends earlier.
        content: results so far, those of an interrupted run to begin with; `save` writes them.
    """

    stage: str
    device: torch.device
    smoke: bool
    out: Path
    seconds: float
    content: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """The stage's file."""
        return stage_path(self.out, self.stage)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self.began)

    def save(self, **content: Any) -> None:
        """Add to the results, and put them on disk."""
        self.content |= content
        write_stage(self.out, self.stage, "partial", self.content, self.seconds - self.left)


def stage_path(out: Path, stage: str) -> Path:
    """Where a stage's results are."""
    return out / f"{stage}.json"


def write_stage(
    out: Path,
    stage: str,
    status: str,
    content: Mapping[str, Any],
    seconds: float,
    error: str | None = None,
) -> None:
    """Put a stage's results on disk, whole or not at all.

    Args:
        status: "done", "partial" (running, or killed while it was), "failed" or "out of time".
        error: what ended it, unless done.
    """
    record = {"stage": stage, "status": status, "seconds": round(seconds, 1), "error": error}
    write_json(stage_path(out, stage), {**record, "content": dict(content)})


def read_stage(out: Path, stage: str) -> dict[str, Any] | None:
    """A stage's results, or None if there are none that can be read."""
    try:
        found: dict[str, Any] = json.loads(stage_path(out, stage).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return found
