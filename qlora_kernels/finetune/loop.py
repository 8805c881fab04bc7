"""The training loop: one step, the loop with its checkpoints, and held-out evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from qlora_kernels.errors import QLKError
from qlora_kernels.finetune.checkpoint import Progress
from qlora_kernels.finetune.console import say
from qlora_kernels.finetune.data import TokenWindows
from qlora_kernels.finetune.interrupt import Interrupted, StopRequest
from qlora_kernels.finetune.optimizers import clip_gradients, synchronize
from qlora_kernels.finetune.schedule import learning_rate_factor
from qlora_kernels.finetune.settings import Settings, derived_seed

MAX_GRADIENT_NORM = 1.0


@dataclass
class Job:
    """One model being trained on one text; ``save`` writes a checkpoint of it."""

    settings: Settings
    model: nn.Module
    optimizer: torch.optim.Optimizer
    windows: TokenWindows
    progress: Progress
    save: Callable[[], None]


def next_token_loss(model: nn.Module, windows: Tensor, settings: Settings) -> Tensor:
    """Mean cross entropy, in nats, of each token of ``windows`` [batch, seq_len + 1] but the first.

    Full fine-tuning keeps fp32 weights, without which small updates round away, and computes in
    the run's dtype under autocast; frozen weights already are in that dtype.
    """
    windows = windows.to(settings.torch_device)
    mixed = settings.method == "full" and settings.torch_dtype != torch.float32
    with torch.autocast(settings.torch_device.type, settings.torch_dtype, enabled=mixed):
        output = model(windows[:, :-1])
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def loss_scale(settings: Settings) -> float:
    """What a step's loss is multiplied by before backward: in float16, whose smallest number is
    6e-8, the gradients of a mean over the tokens of a step are lost. A power of two near their
    number makes them those of a sum, and unlike a scale that adapts it has no state to resume."""
    if settings.torch_dtype != torch.float16:
        return 1.0
    return 2.0 ** int(math.log2(settings.batch * settings.seq_len))


def unscale_gradients(optimizer: torch.optim.Optimizer, scale: float, step: int) -> None:
    """Undo `loss_scale`. Raises QLKError where a gradient is not finite."""
    synchronize(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            parameter.grad.mul_(1 / scale)
            if not bool(parameter.grad.isfinite().all()):
                raise QLKError(
                    f"finetune: a gradient is too large for float16 at step {step + 1}; try "
                    "--dtype bfloat16"
                )


def train_step(job: Job, step: int) -> float:
    """One optimizer step on the windows of ``step``; returns the loss before it.

    Raises QLKError where the loss is not finite.
    """
    settings = job.settings
    torch.manual_seed(derived_seed(settings.seed, "step", step))
    job.model.train()
    factor = learning_rate_factor(step, settings.steps, settings.schedule, settings.warmup_steps)
    for group in job.optimizer.param_groups:
        group["lr"] = settings.lr * factor
    windows = job.windows.batch(settings.seed, step, settings.batch)
    loss = next_token_loss(job.model, windows, settings)
    value = loss.item()
    if not math.isfinite(value):
        raise QLKError(f"finetune: the loss is {value} at step {step + 1}; try a smaller --lr")
    scale = loss_scale(settings)
    (loss * scale).backward()
    if scale != 1.0:
        unscale_gradients(job.optimizer, scale, step)
    clip_gradients(job.optimizer, MAX_GRADIENT_NORM)
    job.optimizer.step()
    job.optimizer.zero_grad()
    return value


def fit(job: Job, stop: StopRequest) -> None:
    """Train from ``job.progress`` to the last step, saving every ``checkpoint_every`` steps and at
    the end. Shows a bar where stderr is a terminal, else ten lines.

    Raises Interrupted, after saving, when ``stop`` was requested.
    """
    settings, progress = job.settings, job.progress
    bar = tqdm(
        total=settings.steps,
        initial=progress.step,
        desc=settings.method,
        unit="step",
        mininterval=0.5,
        disable=None,
    )
    line_every = max(1, settings.steps // 10)
    with bar:
        while progress.step < settings.steps:
            began = time.perf_counter()
            progress.train_losses.append(train_step(job, progress.step))
            progress.step += 1
            progress.seconds += time.perf_counter() - began
            loss = f"loss {progress.train_losses[-1]:.4f}"
            bar.set_postfix_str(loss, refresh=False)
            bar.update()
            if bar.disable and progress.step % line_every == 0:
                say(f"{settings.method}: step {progress.step} of {settings.steps}, {loss}")
            last = progress.step == settings.steps
            if last or stop.signal is not None or progress.step % settings.checkpoint_every == 0:
                job.save()
            if stop.signal is not None:
                raise Interrupted(
                    f"stopped after step {progress.step} of {settings.steps}, saved in "
                    f"{settings.out}; --resume continues",
                    stop.signal,
                )


@torch.no_grad()
def evaluate(job: Job, stop: StopRequest) -> float:
    """Mean held-out loss in nats per token.

    Raises Interrupted when ``stop`` was requested, QLKError where the loss is not finite.
    """
    job.model.eval()
    total = 0.0
    for windows in job.windows.held_out.split(job.settings.batch):
        loss = next_token_loss(job.model, windows.long(), job.settings)
        total += loss.item() * len(windows)
        stop.check(f"in an evaluation after step {job.progress.step}")
    if not math.isfinite(total):
        raise QLKError(
            f"finetune: the held-out loss is {total} after step {job.progress.step}; try a smaller "
            "--lr"
        )
    return total / len(job.windows.held_out)
