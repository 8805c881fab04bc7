"""What the files of a checkpoint hold, from their headers: where each tensor goes in a model, and
bitsandbytes' block size."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import load_state_dict

from qlora_kernels.errors import CheckpointError
from qlora_kernels.formats.bitsandbytes import STATE_KEY, read_quant_state
from qlora_kernels.formats.dynamic8 import SCALE_BLOCK_SIZE


@contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as held:
            yield held
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def stored_names(files: Iterable[str | Path]) -> list[str]:
    """Names of the tensors in a checkpoint's files.

    Raises:
        CheckpointError: a file that is truncated or foreign.
    """
    names: list[str] = []
    for file in files:
        if str(file).endswith(".safetensors"):
            with _opened(file) as held:
                names += held.keys()
        else:
            names += load_state_dict(file, map_location="meta")
    return names


def bitsandbytes_block_size(files: Iterable[str | Path]) -> int | None:
    """The block size of bitsandbytes' weights in safetensors files; None where there are none.

    Raises:
        CheckpointError: weights of several block sizes, or of scales in other blocks than 256.
    """
    found: dict[int, str] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with _opened(file) as held:
            for name in filter(lambda name: STATE_KEY in name, held.keys()):
                state = read_quant_state(held.get_tensor(name), name)
                nested = state.get("nested_blocksize", SCALE_BLOCK_SIZE)
                if nested != SCALE_BLOCK_SIZE:
                    raise CheckpointError(
                        f"{name} has scales in blocks of {nested}, not {SCALE_BLOCK_SIZE}"
                    )
                found.setdefault(state.get("blocksize", 0), name)
    if len(found) > 1:
        mixed = " and ".join(f"{name} has block size {size}" for size, name in found.items())
        raise CheckpointError(f"{mixed}; a model here has one")
    return next(iter(found), None)


def places(
    names: Sequence[str], conversions: Sequence[Any], prefix: str, held: dict[str, Any]
) -> set[str]:
    """The parameters that a checkpoint's tensors go to, as transformers' loading finds them.

    Args:
        names: of the tensors.
        conversions: the renamings and converters of the model.
        prefix: name of the model's body, which a checkpoint of the body alone leaves out.
        held: the model's state dict.
    """
    # Some renamings keep a state between names; converters only note that they were used.
    renamings = [copy.deepcopy(c) for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    targets = {p: c.target_patterns for c in converters for p in c.source_patterns}
    found: set[str] = set()
    for name in sorted(names, key=dot_natural_key):
        place, pattern = rename_source_key(name, renamings, converters, prefix, held)
        if place not in held and name in held:
            place, pattern = rename_source_key(name, [], [], prefix, held)
        found.add(place)
        if pattern is not None:
            first, *others = targets[pattern]
            found.update(place.replace(first, other) for other in others)
    return found
