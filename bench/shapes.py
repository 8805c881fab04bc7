"""The problem that the table of targets is stated for, its operands in enough copies to miss the
caches; and the layers of real models, for the grid."""

from __future__ import annotations

import math
import re

import torch

import qlora_kernels as qlk
from qlora_kernels.errors import argument_error
from qlora_kernels.integrations.plan import SHAPES
from qlora_kernels.testing.timing import Rotation

# One attention projection of a 7-billion-parameter model, [N, K].
WEIGHT = (4096, 4096)
BLOCK_SIZE = 64
FORMAT = "nf4"
DTYPE = torch.bfloat16


def dense_weights(shape: tuple[int, int] = WEIGHT, dtype: torch.dtype = DTYPE) -> Rotation:
    """Rotated dense weights, distributed as trained ones about are: normal, σ = 0.02."""

    def make(i: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(i)
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    return Rotation(make, math.prod(shape) * dtype.itemsize)


def dense_outputs(shape: tuple[int, int] = WEIGHT, dtype: torch.dtype = DTYPE) -> Rotation:
    """Rotated outputs whose pages exist: they have been written to once."""
    return Rotation(lambda _: torch.zeros(shape, dtype=dtype), math.prod(shape) * dtype.itemsize)


def quantized_weights(shape: tuple[int, int] = WEIGHT, dtype: torch.dtype = DTYPE) -> Rotation:
    """Rotated nf4 weights, block size 64, double-quantized."""

    def make(i: int) -> qlk.QuantizedWeight:
        generator = torch.Generator().manual_seed(i)
        weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        return qlk.quantize(weight, format=FORMAT, block_size=BLOCK_SIZE, double_quant=True)

    return Rotation(make, math.prod(shape) // 2)


def layer_shapes() -> dict[str, tuple[int, int]]:
    """Name -> [N, K]: the linear layers of the models that papers quote, and two small ones.

    "llama-7b.q" also stands for the output projection, ".gate" for up; ".kv" is there where keys
    and values have fewer heads. Sizes are `plan`'s, from the released models' configurations.
    """
    found = {"tiny": (128, 128), "small": (1024, 1024)}
    for model, (_, hidden, intermediate, _, heads, kv_heads) in SHAPES.items():
        found[f"{model}.q"] = (hidden, hidden)
        if kv_heads < heads:
            found[f"{model}.kv"] = (hidden // heads * kv_heads, hidden)
        found[f"{model}.gate"] = (intermediate, hidden)
        found[f"{model}.down"] = (hidden, intermediate)
    return found


def parse_shapes(text: str) -> dict[str, tuple[int, int]]:
    """Name -> [N, K] of a comma-separated list: a layer ("llama-7b.gate"), a model, "all", or
    sizes ("11008x4096"). A shape that several layers have is listed once, under the first name.

    Raises:
        ArgumentError: names nothing.
    """
    known = layer_shapes()
    found: dict[str, tuple[int, int]] = {}
    for item in text.split(","):
        sizes = re.fullmatch(r"(\d+)x(\d+)", item)
        chosen = {
            name: shape
            for name, shape in known.items()
            if item in ("all", name, name.split(".")[0])
        }
        if sizes:
            chosen = {item: (int(sizes[1]), int(sizes[2]))}
        if not chosen:
            models = sorted({name.split(".")[0] for name in known})
            raise argument_error("bench", "shape", f"NxK, a layer, or one of {models}", repr(item))
        for name, shape in chosen.items():
            if shape not in found.values():
                found[name] = shape
    return found
