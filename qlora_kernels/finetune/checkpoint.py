"""Checkpoints: one safetensors file with what is trained, the optimizer's state and the progress.

Nothing random is stored because nothing random has state (`settings.derived_seed`): the step alone
gives the data position and every seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qlora_kernels.errors import CheckpointError
from qlora_kernels.files import save_tensors, tensor_bytes
from qlora_kernels.finetune.optimizers import optimizer_state, restore_optimizer
from qlora_kernels.finetune.settings import option

CHECKPOINT = "checkpoint.safetensors"
KIND = "qlora_kernels.finetune.checkpoint/1"


@dataclass
class Progress:
    """How far a run is. ``seconds`` counts training steps only; losses are nats per token."""

    step: int = 0
    train_losses: list[float] = field(default_factory=list)
    eval_loss_before: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file's content; ``identity`` is what a resumed run must have in common."""

    path: Path
    progress: Progress
    identity: dict[str, object]
    tensors: dict[str, Tensor]

    @property
    def is_finished(self) -> bool:
        return self.progress.step == self.identity.get("steps")

    def check_identity(self, identity: Mapping[str, object]) -> None:
        """Raises CheckpointError naming the first option, or the text, that differs."""
        found = difference(self.identity, identity)
        if found is not None:
            raise CheckpointError(f"finetune: --resume: {self.path} is of another run ({found})")

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the saved values into ``model``'s trained parameters and ``optimizer``.

        Raises CheckpointError for tensors that do not fit them; the model is unchanged then if it
        was the model they do not fit.
        """
        named = trained_parameters(model)
        states: dict[nn.Parameter, dict[str, Tensor]] = {}
        for name, parameter in named.items():
            saved = self.tensors.get(f"model.{name}")
            if saved is None or saved.shape != parameter.shape or saved.dtype != parameter.dtype:
                raise CheckpointError(
                    f"finetune: --resume: {self.path} does not fit the model at {name}"
                )
            prefix = f"optimizer.{name}."
            states[parameter] = {
                key.removeprefix(prefix): value
                for key, value in self.tensors.items()
                if key.startswith(prefix)
            }
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(self.tensors[f"model.{name}"])
        if reason := restore_optimizer(optimizer, states):
            raise CheckpointError(
                f"finetune: --resume: {self.path} does not fit the optimizer: {reason}"
            )


def difference(saved: Mapping[str, object], wanted: Mapping[str, object]) -> str | None:
    """The first thing that two runs do not have in common, for a message, or None."""
    for name, value in wanted.items():
        if saved.get(name) != value:
            what = "the text" if name == "text" else option(name)
            return f"{what} is {shown(saved.get(name))} there and {shown(value)} here"
    return None


def shown(value: object) -> str:
    """A value in a message; digests shortened."""
    text = str(value)
    return text if len(text) < 40 else text[:12] + "…"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name, in the optimizer's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, object],
) -> None:
    """Write a checkpoint atomically. Raises OSError; the previous one is then untouched."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer_state(optimizer, parameter).items():
            tensors[f"optimizer.{name}.{key}"] = value
    metadata = {
        "kind": KIND,
        "progress": json.dumps(asdict(progress)),
        "identity": json.dumps(identity),
        "sha256": digest(tensors),
    }
    save_tensors(path, tensors, metadata)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, is truncated, damaged or not a checkpoint of this
            library.
    """
    found = load_header(path)
    with opened(path) as file:
        names = file.keys()
        found.tensors.update({name: file.get_tensor(name) for name in names})
        sha256 = file.metadata().get("sha256")
    if digest(found.tensors) != sha256:
        raise CheckpointError(f"finetune: {path} is damaged: its digest does not match")
    return found


def load_header(path: Path) -> Checkpoint:
    """`load_checkpoint` without the tensors, whose digest is then not verified."""
    with opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"finetune: {path} is not a checkpoint of this library")
    try:
        progress = Progress(**json.loads(metadata["progress"]))
        return Checkpoint(path, progress, dict(json.loads(metadata["identity"])), {})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"finetune: {path} is damaged ({error})") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its errors as CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"finetune: {path} is truncated or foreign ({error})") from error
    except OSError as error:
        raise CheckpointError(f"finetune: {path} cannot be read ({error})") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes, by name: readers may list tensors in another order."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensor_bytes(tensors[name]))
    return state.hexdigest()
