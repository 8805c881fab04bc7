"""convert: a checkpoint between dense, this library's and bitsandbytes' files, a weight at a time.

What is written first is `DST.partial`, shard by shard, each whole or not at all; the folder gets
its name when all is there. The same command after an interruption goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qlora_kernels.errors import CheckpointError, argument_error
from qlora_kernels.files import save_tensors, sync_folder, write_text
from qlora_kernels.integrations.checkpoints import CONFIG, INDEX, KINDS, read_checkpoint
from qlora_kernels.integrations.contents import bitsandbytes_block_size
from qlora_kernels.integrations.convert_job import Job
from qlora_kernels.integrations.optional import require

SETTINGS = "conversion.json"


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "qlora_kernels",
    format: str | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    skip: Iterable[str] = (),
    dtype: torch.dtype = torch.bfloat16,
    adapter: str | Path | None = None,
    shard_bytes: int = 2 * 2**30,
    progress: bool = True,
) -> Path:
    """Convert a checkpoint folder; at most one shard of the result is in memory, and one weight of
    the source, which for a mixture of experts is a projection of all of a layer's experts.

    A mixture's experts are quantized in this library's files. bitsandbytes' hold them dense, which
    is how they come from it and go to it; quantized ones go to it by way of a dense checkpoint.

    Args:
        source: a folder with config.json and safetensors files.
        destination: must not exist.
        to: "qlora_kernels", "bitsandbytes" or "dense".
        format, block_size, double_quant, skip: as `QLoRAKernelsConfig`, when source is dense.
        dtype: of every floating-point tensor of a dense result.
        adapter: a folder with a LoRA adapter in PEFT's layout that is added to the weights, of
            experts (target_parameters) too; those that it adapts are quantized anew.
        shard_bytes: a file of the result is closed when it holds that much.
        progress: show a bar on stderr.

    Returns:
        The destination.

    Raises:
        ImportError: transformers is not installed.
        ArgumentError: a destination that exists, an unknown kind, a format that bitsandbytes does
            not have, or quantized experts for it.
        CheckpointError: a source that cannot be read or does not fit its configuration; an adapter
            of another model, or with more than A and B; a partial result of other settings.
    """
    require("transformers", "convert")
    from qlora_kernels.integrations.transformers import QLoRAKernelsConfig

    target = Path(destination)
    if to not in KINDS:
        raise argument_error("convert", "--to", f"one of {KINDS}", repr(to))
    if shard_bytes <= 0:
        raise argument_error("convert", "--shard-size", "above 0", shard_bytes)
    if target.exists() and not (target / SETTINGS).exists():
        raise argument_error("convert", "DST", "a folder that does not exist", str(target))
    checkpoint = read_checkpoint(source)
    stored = checkpoint.config.get("quantization_config") or {}
    if checkpoint.kind == "dense":
        config = QLoRAKernelsConfig(
            format=format or "nf4",
            block_size=block_size,
            double_quant=double_quant,
            skip=list(skip),
            checkpoint="bitsandbytes" if to == "bitsandbytes" else "qlora_kernels",
        )
    elif format is not None or block_size is not None or double_quant is not None or tuple(skip):
        raise argument_error("convert", "--format and its like", "for a dense SRC", checkpoint.kind)
    elif checkpoint.kind == "bitsandbytes":
        size = bitsandbytes_block_size(sorted(set(checkpoint.files.values())))
        config = QLoRAKernelsConfig.from_bitsandbytes(stored, size)
    else:
        config = QLoRAKernelsConfig(**stored)
    if to == "bitsandbytes":  # refused here if its files cannot hold the format
        QLoRAKernelsConfig(format=config.format, checkpoint="bitsandbytes")
    job = Job(checkpoint, config, to, dtype, adapter)
    settings = {
        "source": str(Path(source).resolve()),
        "to": to,
        "config": job.config.fields(),
        "dtype": str(dtype),
        "adapter": None if adapter is None else str(Path(adapter).resolve()),
        "shard_bytes": shard_bytes,
    }
    if target.exists():  # killed between the last two steps
        if _read_settings(target) != settings:
            raise argument_error("convert", "DST", "a folder that does not exist", str(target))
        (target / SETTINGS).unlink()
        return target
    partial = target.with_name(target.name + ".partial")
    with _writing(partial):
        _resume_or_start(partial, settings)
    plan = _shards(list(job.sizes()), shard_bytes)
    index: dict[str, str] = {}
    total = 0
    with tqdm(total=sum(len(shard) for shard in plan), unit="weight", disable=not progress) as bar:
        for number, shard in enumerate(plan, start=1):
            name = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            name = "model.safetensors" if len(plan) == 1 else name
            path = partial / name
            if not path.exists():
                tensors: dict[str, torch.Tensor] = {}
                for item in shard:
                    tensors.update(job.convert(*item))
                    bar.update()
                with _writing(path):
                    save_tensors(path, tensors, {"format": "pt"})
            else:
                bar.update(len(shard))
            for key, size in _contents(path):
                index[key] = name
                total += size
    with _writing(partial):
        if len(plan) > 1:
            body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
            write_text(partial / INDEX, json.dumps(body, indent=2) + "\n")
        _copy_others(checkpoint.folder, partial)
        write_text(partial / CONFIG, json.dumps(job.result_config(), indent=2) + "\n")
        partial.rename(target)
        (target / SETTINGS).unlink()
        sync_folder(target.parent)
    return target


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Names the file where writing fails.

    Raises:
        CheckpointError: a full disk, no permission.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise CheckpointError(f"convert: {where} cannot be written: {error.strerror}") from error


def _shards(items: list[Any], shard_bytes: int) -> list[list[Any]]:
    """The weights of each file of the result; the same for the same source and settings."""
    shards: list[list[Any]] = [[]]
    held = 0
    for key, layer, names, size in items:
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((key, layer, names))
        held += size
    return shards


def _read_settings(folder: Path) -> Any:
    """What a conversion noted in its folder.

    Raises:
        CheckpointError: nothing that can be read.
    """
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"convert: {folder} is not a conversion to go on with") from error


def _resume_or_start(partial: Path, settings: dict[str, Any]) -> None:
    """Make the folder to write to, or see that it was begun with these settings."""
    partial.mkdir(parents=True, exist_ok=True)
    for unfinished in partial.glob(".*.tmp"):  # of a write that was killed
        unfinished.unlink()
    if not any(partial.iterdir()):
        write_text(partial / SETTINGS, json.dumps(settings, indent=2) + "\n")
        return
    before = _read_settings(partial)
    if before != settings:
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        raise CheckpointError(
            f"convert: {partial} was begun with another {', '.join(changed)}; remove it to start "
            "anew"
        )


def _contents(path: Path) -> list[tuple[str, int]]:
    """Names and bytes of a file's tensors, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return [
        (key, entry["data_offsets"][1] - entry["data_offsets"][0]) for key, entry in header.items()
    ]


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, generation settings and so on."""
    weights = (".safetensors", ".bin", ".pt", ".pth")
    for path in source.iterdir():
        if (
            path.is_file()
            and path.suffix not in weights
            and path.name not in (CONFIG, INDEX, SETTINGS)
        ):
            shutil.copyfile(path, target / path.name)
