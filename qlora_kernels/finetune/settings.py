"""What a fine-tuning run was asked to do: every option, its default, and the rule it must obey."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_kernels.errors import argument_error
from qlora_kernels.finetune.optimizers import OPTIMIZERS
from qlora_kernels.finetune.schedule import SCHEDULES
from qlora_kernels.formats import list_formats
from qlora_kernels.formats.format import check_block_size

METHODS = ("full", "lora", "qlora")
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
# Where the output goes and how often it is saved does not change what is computed.
NOT_COMPARED_ON_RESUME = frozenset({"out", "resume", "checkpoint_every"})


@dataclass(frozen=True)
class Defaults:
    """Defaults that depend on the model; an adapter's alpha is ``scaling`` times its rank."""

    full_lr: float
    adapter_lr: float
    rank: int
    scaling: float
    steps: int
    batch: int
    seq_len: int


# Chosen by a sweep at these very steps and batch (bench/finetune_sweep.py): the learning rates are
# each method's own best.
EMBEDDED = Defaults(
    full_lr=5e-4, adapter_lr=1.5e-3, rank=48, scaling=4.0, steps=150, batch=8, seq_len=256
)
# Customary for pretrained models of 0.1 to 10 billion parameters (the QLoRA paper, table 9).
PRETRAINED = Defaults(
    full_lr=2e-5, adapter_lr=2e-4, rank=16, scaling=2.0, steps=200, batch=4, seq_len=512
)


@dataclass(frozen=True)
class Settings:
    """One run of one method, fully resolved. Raises ArgumentError for a value out of range."""

    method: str
    out: Path
    model: str | None = None
    data: tuple[str, ...] = ()
    format: str = "nf4"
    block_size: int | None = None
    double_quant: bool = True
    rank: int = EMBEDDED.rank
    alpha: float = EMBEDDED.scaling * EMBEDDED.rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    lr: float = EMBEDDED.adapter_lr
    schedule: str = "cosine"
    optim: str = "adamw"
    steps: int = EMBEDDED.steps
    batch: int = EMBEDDED.batch
    seq_len: int = EMBEDDED.seq_len
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    resume: bool = False
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch", "seq_len", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise argument_error("finetune", option(name), "at least 1", getattr(self, name))
        for name in ("lr", "alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise argument_error("finetune", option(name), "positive and finite", value)
        if not 0 <= self.dropout <= 1:
            raise argument_error("finetune", "--dropout", "between 0 and 1", self.dropout)
        if not 0 <= self.seed < 2**63:
            raise argument_error("finetune", "--seed", "between 0 and 2^63 - 1", self.seed)
        for name, choices in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("optim", tuple(OPTIMIZERS)),
            ("dtype", tuple(DTYPES)),
            ("format", tuple(list_formats())),
        ):
            if getattr(self, name) not in choices:
                rule = f"one of {', '.join(choices)}"
                raise argument_error("finetune", option(name), rule, getattr(self, name))
        if self.block_size is not None:
            check_block_size("finetune", self.block_size, "--block-size")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations and of frozen weights; what is trained is always fp32."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def warmup_steps(self) -> int:
        """A twentieth of the run."""
        return max(1, self.steps // 20)

    def to_json(self) -> dict[str, object]:
        """Every option as JSON holds it."""
        values = dataclasses.asdict(self)
        values.update(out=str(self.out), data=list(self.data), targets=list(self.targets))
        return values

    def compared_on_resume(self) -> dict[str, object]:
        """The options that must be the same for a resumed run to give the same losses."""
        values = self.to_json()
        return {name: values[name] for name in values if name not in NOT_COMPARED_ON_RESUME}


def option(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def settings_from_json(values: dict[str, object]) -> Settings:
    """Inverse of `Settings.to_json`."""
    restored = dict(values)
    restored["out"] = Path(str(values["out"]))
    for name in ("data", "targets"):
        items = values[name]
        restored[name] = tuple(items) if isinstance(items, list) else ()
    return Settings(**restored)  # type: ignore[arg-type]


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the device computes in it natively, else float32."""
    if name != "auto":
        return str(DTYPES[name]).removeprefix("torch.")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def resolve_device(name: str) -> str:
    """`auto` is CUDA where there is one. Raises ArgumentError for a device torch does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise argument_error("finetune", "--device", "auto, cpu, cuda or cuda:N", name)
    count = torch.cuda.device_count() if name != "cpu" else 0
    if name != "cpu" and int(found[1] or 0) >= count:
        rule = f"in cuda:0 ... cuda:{count - 1}" if count else "cpu, as torch sees no CUDA device"
        raise argument_error("finetune", "--device", rule, name)
    return name


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed for one use of randomness. Everything random is drawn from (seed, use, index)
    and never from a running state, so a resumed run draws what the uninterrupted one would have."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
