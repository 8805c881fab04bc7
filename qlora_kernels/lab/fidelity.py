"""`lab fidelity`: what each format costs on each set of weights; other commands take its cells.

A cell is one tensor under one variant. Of a file, one tensor is in memory at a time, quantized by
every variant before the next is read. Where the set is an encoder's weights, whose embeddings are
compared too, variants come one after the other instead, each put into the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kernels.errors import ArgumentError, argument_error
from qlora_kernels.lab.cache import CellCache, cell_key, tensor_digest
from qlora_kernels.lab.console import Bar
from qlora_kernels.lab.encoder import SentenceEncoder
from qlora_kernels.lab.metrics import Fidelity, Sums, add, fidelity, measure
from qlora_kernels.lab.variants import Variant
from qlora_kernels.lab.weights import WeightSet

NOTES = (
    "bits: of all stored tensors, over the weights.",
    "relative error: ‖W - Ŵ‖ / ‖W‖ over the whole set; NMSE dB: 20 log10 of it, 6.02 dB are a bit.",
    "max error: max |W - Ŵ|, in the weights' unit.",
    "code entropy: bits of information in a code, at most its width.",
    "cosine: of sentence embeddings of the quantized model with the dense one's.",
)


@dataclass(frozen=True)
class Measured:
    """A variant on a set; cosines (mean, min) where the set is an encoder's weights."""

    weights: str
    variant: Variant
    figures: Fidelity
    cosines: tuple[float, float] | None = None

    @property
    def row(self) -> dict[str, Any]:
        """The row of a table."""
        figures = {
            "bits": self.figures.bits,
            "relative error": self.figures.relative_error,
            "NMSE dB": self.figures.nmse_db,
            "max error": self.figures.max_error,
            "code entropy": self.figures.code_entropy,
        }
        if self.cosines is not None:
            figures |= {"cosine mean": self.cosines[0], "cosine min": self.cosines[1]}
        return {"weights": self.weights, **self.variant.columns, **figures}


def run_fidelity(
    sets: Sequence[WeightSet],
    variants: Sequence[Variant],
    cache: CellCache,
    embeddings: bool = False,
) -> list[Measured]:
    """Every variant on every set, in the order of sets and, within one, from best to worst.

    Args:
        embeddings: also compare embeddings, of the sets that are an encoder's.

    Raises:
        ArgumentError: weights that cannot be quantized (the tensor is named), or all 0.
    """
    found: list[Measured] = []
    with Bar("fidelity", sum(len(weights.sources) for weights in sets) * len(variants)) as bar:
        for weights in sets:
            if embeddings and weights.encoder is not None:
                measured = measure_encoder(weights, weights.encoder, variants, cache, bar)
            else:
                measured = measure_stream(weights, variants, cache, bar)
            found += sorted(measured, key=lambda one: one.figures.nmse_db)
    return found


def measure_stream(
    weights: WeightSet, variants: Sequence[Variant], cache: CellCache, bar: Bar
) -> list[Measured]:
    """One tensor after the other."""
    sums: list[list[Sums]] = [[] for _ in variants]
    for source in weights.sources:
        weight = source.load()
        digest = tensor_digest(weight)
        for variant, parts in zip(variants, sums, strict=True):
            cell = cache.get(tensor_key(digest, variant))
            if cell is None:
                where = f"{weights.name}: {source.name}"
                cell, _ = quantized_cell(where, weight, digest, variant, cache)
            parts.append(Sums.from_json(cell))
            bar.step(f"{weights.name} {variant.label}")
    return [
        Measured(weights.name, variant, fidelity(add(parts), weights.name))
        for variant, parts in zip(variants, sums, strict=True)
    ]


def measure_encoder(
    weights: WeightSet, folder: Path, variants: Sequence[Variant], cache: CellCache, bar: Bar
) -> list[Measured]:
    """One variant after the other, all of an encoder's tensors at hand."""
    tensors = {source.name: source.load() for source in weights.sources}
    digests = {name: tensor_digest(weight) for name, weight in tensors.items()}
    encoder: SentenceEncoder | None = None
    found: list[Measured] = []
    for variant in variants:
        key = cell_key("embeddings", tensors=digests, format=variant.digest)
        cosines = cache.get(key)
        parts: list[Sums] = []
        for name, weight in tensors.items():
            cell = cache.get(tensor_key(digests[name], variant))
            if cell is None or cosines is None:
                where = f"{weights.name}: {name}"
                cell, dense = quantized_cell(where, weight, digests[name], variant, cache)
                if cosines is None:
                    encoder = encoder or SentenceEncoder(folder)
                    encoder.set_weight(name, dense)
            parts.append(Sums.from_json(cell))
            bar.step(f"{weights.name} {variant.label}")
        if cosines is None:
            assert encoder is not None
            held = encoder.cosines()
            cosines = cache.put(key, {"mean": float(held.mean()), "min": float(held.min())})
        figures = fidelity(add(parts), weights.name)
        found.append(Measured(weights.name, variant, figures, (cosines["mean"], cosines["min"])))
    return found


def tensor_key(digest: str, variant: Variant) -> str:
    """The key of a tensor's cell."""
    return cell_key("fidelity", tensor=digest, format=variant.digest)


def quantized_cell(
    where: str, weight: Tensor, digest: str, variant: Variant, cache: CellCache
) -> tuple[dict[str, Any], Tensor]:
    """Quantize, store the cell, and return it with the dequantized weight (fp32)."""
    try:
        sums, dense = measure(weight, variant.format)
    except ArgumentError as error:
        got = f"{where} with {variant.label} ({error})"
        raise argument_error("lab", "the weights", "such as quantize takes", got) from error
    return cache.put(tensor_key(digest, variant), sums.to_json()), dense
