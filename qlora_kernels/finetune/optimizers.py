"""`--optim`: AdamW as torch, bitsandbytes and torchao have it, and its state for a checkpoint.

All are AdamW without weight decay; they differ in where its two moments are and in how many bits:

- adamw, adamw-fused: fp32 on the device; fused is one kernel for all parameters.
- adamw-8bit: bitsandbytes' 8-bit blockwise moments (parameters below 4096 values keep fp32).
- paged-adamw, paged-adamw-8bit: bitsandbytes' fp32 or 8-bit moments in memory that moves to the
  host when the GPU's runs short, as in the QLoRA paper; on a CPU there is nothing to move.
- offload-adamw: torchao keeps the moments on the host and computes the step there; on GPUs only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.errors import QLKError, argument_error

# A shorter memory of squared gradients than Adam's 0.999, whose horizon outlasts short runs.
ADAM_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Choice:
    """A value of `--optim`.

    Attributes:
        package: module the class is in; its root is what must be installed.
        name: of the class.
        install: what pip is to install.
        options: beyond the learning rate, betas and weight decay.
    """

    package: str
    name: str
    install: str = ""
    options: tuple[tuple[str, Any], ...] = ()


_BNB = ("bitsandbytes.optim", "'qlora_kernels[bnb]'")
OPTIMIZERS = {
    "adamw": Choice("torch.optim", "AdamW"),
    "adamw-fused": Choice("torch.optim", "AdamW", options=(("fused", True),)),
    "adamw-8bit": Choice(_BNB[0], "AdamW8bit", _BNB[1]),
    "paged-adamw": Choice(_BNB[0], "PagedAdamW32bit", _BNB[1]),
    "paged-adamw-8bit": Choice(_BNB[0], "PagedAdamW8bit", _BNB[1]),
    "offload-adamw": Choice("torchao.optim", "CPUOffloadOptimizer", "torchao"),
}
NEEDS_GPU = frozenset({"offload-adamw"})


def optimizer_class(name: str, device: torch.device) -> Any:
    """The class of a value of `--optim`.

    Raises:
        ArgumentError: it does not run on ``device``.
        QLKError: its package is not installed.
    """
    choice = OPTIMIZERS[name]
    if name in NEEDS_GPU and device.type != "cuda":
        rest = ", ".join(other for other in OPTIMIZERS if other not in NEEDS_GPU)
        raise argument_error(
            "finetune", "--optim", f"one that runs on {device.type} ({rest})", f"{name}, for GPUs"
        )
    root = choice.package.split(".")[0]
    try:
        importlib.import_module(root)
        return getattr(importlib.import_module(choice.package), choice.name)
    except ModuleNotFoundError as error:
        if error.name != root:
            raise
        raise QLKError(
            f"finetune: --optim {name} needs {root}: pip install {choice.install}"
        ) from error


def make_optimizer(
    parameters: Iterable[nn.Parameter], name: str, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW without weight decay. Raises as `optimizer_class`."""
    options: dict[str, Any] = {"lr": lr, "betas": ADAM_BETAS, "weight_decay": 0.0}
    options |= dict(OPTIMIZERS[name].options)
    optimizer: torch.optim.Optimizer = optimizer_class(name, device)(list(parameters), **options)
    return optimizer


def synchronize(optimizer: Any) -> None:
    """Wait for the gradients that an optimizer reads: of an offloaded one copies on the host."""
    if hasattr(optimizer, "optim_dict"):
        optimizer.stream.synchronize()


def clip_gradients(optimizer: Any, largest: float) -> None:
    """Scale all gradients so that their common norm is at most ``largest``."""
    synchronize(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(trained, largest)


def _owner(optimizer: Any, parameter: nn.Parameter) -> tuple[Any, Tensor]:
    """The optimizer that keeps a parameter's state, and the tensor it keeps it for: an offloaded
    one has an optimizer of its own for each copy on the host."""
    offloaded = getattr(optimizer, "optim_dict", None)
    if offloaded is None:
        return optimizer, parameter
    if parameter in offloaded:
        return offloaded[parameter], optimizer.param_d2h_map[parameter]
    return optimizer.d_opt, parameter


def optimizer_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's state as tensors; a count that is none becomes an int64 one."""
    owner, held = _owner(optimizer, parameter)
    return {
        key: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        for key, value in owner.state[held].items()
    }


def restore_optimizer(
    optimizer: Any, states: Mapping[nn.Parameter, Mapping[str, Tensor]]
) -> str | None:
    """Put states where `optimizer_state` took them from; the parameters have their values already.

    Returns why a state does not fit, or None.
    """
    for parameter, state in states.items():
        owner, held = _owner(optimizer, parameter)
        if held is not parameter:
            held.detach().copy_(parameter.detach())
        if not state:
            continue
        group, index = _place(owner, held)
        if hasattr(owner, "init_state"):
            # bitsandbytes: its own buffers, which alone can be paged.
            owner.init_state(owner.param_groups[group], held, group, index)
            target = owner.state[held]
            if target.keys() != state.keys():
                return f"its state is {', '.join(state)}, not {', '.join(target)}"
            for key, value in state.items():
                if not isinstance(target[key], Tensor):
                    target[key] = int(value)
                elif target[key].shape != value.shape or target[key].dtype != value.dtype:
                    return f"{key} is {tuple(value.shape)}, not {tuple(target[key].shape)}"
                else:
                    target[key].copy_(value)
        else:
            owner.state[held] = {
                # torch keeps its count of steps on the host unless the step is one kernel.
                key: value.clone()
                if key == "step" and not owner.param_groups[group]["fused"]
                else value.clone().to(held.device)
                for key, value in state.items()
            }
    return None


def _place(optimizer: Any, parameter: Tensor) -> tuple[int, int]:
    """Indices of a parameter's group and of its place there."""
    return next(
        (group, index)
        for group, content in enumerate(optimizer.param_groups)
        for index, other in enumerate(content["params"])
        if other is parameter
    )
