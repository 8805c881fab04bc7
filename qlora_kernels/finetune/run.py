"""One run of one method: load, convert, train with checkpoints, save, report."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from qlora_kernels.errors import QLKError
from qlora_kernels.files import current_umask, save_tensors
from qlora_kernels.finetune.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    Progress,
    load_checkpoint,
    save_checkpoint,
    trained_parameters,
)
from qlora_kernels.finetune.console import say
from qlora_kernels.finetune.data import check_vocabulary, load_windows
from qlora_kernels.finetune.interrupt import StopRequest
from qlora_kernels.finetune.load import base_model_name, load_base, load_tokenizer, prepare
from qlora_kernels.finetune.loop import Job, evaluate, fit
from qlora_kernels.finetune.memory import (
    PeakMemory,
    base_weight_bytes,
    parameter_count,
    stored_weights,
)
from qlora_kernels.finetune.optimizers import make_optimizer, optimizer_class
from qlora_kernels.finetune.outputs import (
    MODEL,
    MODEL_FOLDER,
    REPORT,
    claimed,
    read_report,
    remove_leftovers,
    writing,
)
from qlora_kernels.finetune.report import MethodReport, document, write_report
from qlora_kernels.finetune.settings import Settings
from qlora_kernels.nn import lora_parameters, save_adapter


def run_method(settings: Settings, stop: StopRequest) -> MethodReport:
    """Run one method to its end in ``settings.out``; with ``settings.resume`` from where it was.

    Leaves a checkpoint, what was trained (`save_trained`) and report.json, written last.

    Raises:
        Interrupted: ``stop`` was requested; what is needed to resume is saved.
        ArgumentError, CheckpointError, QLKError: see the functions called here.
    """
    with claimed(settings.out):
        path = settings.out / CHECKPOINT
        saved = load_checkpoint(path) if settings.resume and path.exists() else None
        optimizer_class(settings.optim, settings.torch_device)  # missing ones are named at once
        tokenizer = load_tokenizer(settings)
        windows = load_windows(settings, tokenizer)
        identity = {**settings.compared_on_resume(), "text": windows.digest()}
        if saved is not None:
            saved.check_identity(identity)
            done = finished_report(settings, saved)
            if done is not None:
                say(f"{settings.method}: already finished, in {settings.out}")
                return done
        stop.check(f"before {settings.method} began")
        memory = PeakMemory(settings.torch_device)
        base = load_base(settings)
        check_vocabulary(windows, base.vocab_size)
        dense_parameters = parameter_count(base.model)
        model = prepare(base, settings)
        del base
        stop.check(f"before {settings.method} began")
        trained = trained_parameters(model).values()
        optimizer = make_optimizer(trained, settings.optim, settings.lr, settings.torch_device)
        progress = Progress()
        if saved is not None:
            saved.restore(model, optimizer)
            progress = saved.progress
            say(f"{settings.method}: continuing after step {progress.step} of {settings.steps}")
        del saved

        def save() -> None:
            progress.peak_bytes = max(progress.peak_bytes, memory.read())
            with writing(path):
                save_checkpoint(path, model, optimizer, progress, identity)

        remove_leftovers(settings.out)
        job = Job(settings, model, optimizer, windows, progress, save)
        if progress.eval_loss_before is None:
            progress.eval_loss_before = evaluate(job, stop)
            say(f"{settings.method}: held-out loss {progress.eval_loss_before:.4f} before")
        fit(job, stop)
        after = evaluate(job, stop)
        say(f"{settings.method}: held-out loss {after:.4f} after")
        report = MethodReport(
            method=settings.method,
            settings=settings.compared_on_resume(),
            text=str(identity["text"]),
            train_losses=progress.train_losses,
            eval_loss_before=progress.eval_loss_before,
            eval_loss_after=after,
            peak_bytes=max(progress.peak_bytes, memory.read()),
            tokens_per_second=settings.steps * settings.batch * settings.seq_len / progress.seconds,
            **sizes(model, dense_parameters),
        )
        save_trained(model, tokenizer, settings)
        write_report(settings.out, document(settings.method, [report]))
    return report


def finished_report(settings: Settings, saved: Checkpoint) -> MethodReport | None:
    """The report of a run that had already ended, or None."""
    path = settings.out / REPORT
    if not (saved.is_finished and path.exists()):
        return None
    values = read_report(path)["methods"].get(settings.method)
    same = (
        values is not None
        and values["settings"] == settings.compared_on_resume()
        and values["text"] == saved.identity["text"]
    )
    return MethodReport(**values) if same else None


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def sizes(model: nn.Module, dense_parameters: int) -> dict[str, Any]:
    """The report's parameter counts and base weight sizes."""
    adapters = list(lora_parameters(model))
    base_bytes = base_weight_bytes(model, adapters)
    weights, stored_bytes = stored_weights(model)
    return {
        "trainable_parameters": count(trained_parameters(model).values()),
        "total_parameters": dense_parameters + count(adapters),
        "base_bytes": base_bytes,
        "bits_per_parameter": 8 * base_bytes / dense_parameters,
        "quantized_bits_per_parameter": 8 * stored_bytes / weights if weights else None,
    }


def save_trained(model: nn.Module, tokenizer: object, settings: Settings) -> None:
    """Write the adapter in PEFT's layout, or after full fine-tuning the model: a state dict for the
    embedded one, else the folder that transformers loads."""
    out = settings.out
    if settings.method != "full":
        with writing(out):
            save_adapter(model, out, base_model_name=base_model_name(settings))
    elif settings.model is None:
        with writing(out / MODEL):
            save_tensors(out / MODEL, model.state_dict(), {"format": "pt"})
    else:
        with writing(out / MODEL_FOLDER):
            replace_folder(out / MODEL_FOLDER, model, tokenizer)


def replace_folder(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save a transformers model and its tokenizer beside ``folder``, then take its place.

    Raises OSError, or QLKError where a library reports a failed write as an error of its own; the
    old folder is then as it was.
    """
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    fresh.chmod(0o777 & ~current_umask())
    try:
        model.save_pretrained(fresh)
        tokenizer.tokenizer.save_pretrained(fresh)
        old = fresh.with_suffix(".old.tmp")
        if folder.exists():
            os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    except SafetensorError as error:
        raise QLKError(f"finetune: cannot write {folder} ({error})") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
