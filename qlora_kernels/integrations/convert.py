"""convert: a checkpoint between dense, this library's and bitsandbytes' files, a weight at a time.

What is written first is `DST.partial`, shard by shard, each whole or not at all; the folder gets
its name when all is there. The same command after an interruption goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qlora_kernels.errors import ArgumentError, CheckpointError, argument_error
from qlora_kernels.files import save_tensors, sync_folder, write_text
from qlora_kernels.formats.bitsandbytes import to_state_dict
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.integrations.checkpoints import (
    CONFIG,
    INDEX,
    KINDS,
    Checkpoint,
    Layer,
    check_contents,
    groups,
    natural_linear,
    read_checkpoint,
    read_weight,
    skeleton_of,
)
from qlora_kernels.integrations.contents import bitsandbytes_block_size
from qlora_kernels.integrations.convert_experts import Stack, dequantize_stack, quantize_stack
from qlora_kernels.integrations.loading import parameters_of
from qlora_kernels.integrations.optional import require
from qlora_kernels.integrations.saving import bitsandbytes_config
from qlora_kernels.nn.adapter_files import read_adapter
from qlora_kernels.ops import dequantize, quantize

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
        adapter: a folder with a LoRA adapter in PEFT's layout that is added to a dense result.
        shard_bytes: a file of the result is closed when it holds that much.
        progress: show a bar on stderr.

    Returns:
        The destination.

    Raises:
        ImportError: transformers is not installed.
        ArgumentError: a destination that exists, an unknown kind, an adapter for a quantized
            result, a format that bitsandbytes does not have, or quantized experts for it.
        CheckpointError: a source that cannot be read or does not fit its configuration; a partial
            result of other settings.
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
    if adapter is not None and to != "dense":
        raise argument_error("convert", "--adapter", "left out unless --to dense", str(adapter))
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
    job = _Job(checkpoint, config, to, dtype, {} if adapter is None else read_adapter(adapter))
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
    job.check()
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


class _Job:
    """What is converted into what."""

    def __init__(
        self, checkpoint: Checkpoint, config: Any, to: str, dtype: torch.dtype, adapter: Any
    ) -> None:
        self.checkpoint, self.to, self.dtype = checkpoint, to, dtype
        self.skeleton = skeleton_of(checkpoint, config)
        self.config = self.skeleton.config
        self.prefix = self.skeleton.prefix
        if checkpoint.kind == to == "dense":  # its experts stay as they are
            self.skeleton = replace(self.skeleton, stacks={})
        if to == "bitsandbytes" and self.skeleton.stacks:
            first = next(iter(self.skeleton.stacks))
            raise argument_error(
                "convert", "SRC", "without quantized experts (bitsandbytes has none)", first
            )
        self.weight_dtype = getattr(torch, self.config.weight_dtype)
        self.adapter, self.merged = adapter, set[str]()

    def sizes(self) -> Any:
        """(name, layer, tensor names, bytes of the result), one by one.

        Raises:
            CheckpointError: a weight that SRC lacks, or has in another size.
        """
        fmt = self.config.storage
        found = groups(self.checkpoint, self.skeleton)
        check_contents(self.checkpoint, self.skeleton, found)
        for key, layer, names in found:
            if layer is None or self.to == "dense":
                shape, width = self.checkpoint.shape(names[0])
                numel = torch.Size(shape if layer is None else layer.shape).numel()
                size = numel * (self.dtype.itemsize if layer is not None else width)
            else:
                rows, cols = torch.Size(layer.shape[:-1]).numel(), layer.shape[-1]
                stored = fmt.tensor_sizes((rows, cols)).values()
                size = sum(count * dtype.itemsize for count, dtype in stored) + 1200
            yield key, layer, names, size

    def convert(
        self, key: str, layer: Layer | Stack | None, names: list[str]
    ) -> dict[str, torch.Tensor]:
        """The tensors of one weight, or of one stack of experts, in the result.

        Raises:
            CheckpointError: values that cannot be quantized, or tensors that do not fit together.
        """
        try:
            if isinstance(layer, Stack):
                return self._convert_stack(layer, names)
            return self._convert_weight(key, layer, names)
        except ArgumentError as error:
            file = self.checkpoint.files[names[0]]
            raise CheckpointError(f"convert: {key} in {file}: {error}") from error

    def _convert_weight(
        self, key: str, layer: Layer | None, names: list[str]
    ) -> dict[str, torch.Tensor]:
        if layer is None:
            tensor = self.checkpoint.tensor(names[0])
            module = key.removesuffix(".weight")
            if key.endswith(".weight") and self._adapter_of(module) is not None:
                tensor = self._with_adapter(tensor, module)
            if self.to == "dense" and tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
            return {key: tensor}
        fmt = self.config.storage
        held = read_weight(self.checkpoint, key, layer, names, fmt, self.weight_dtype)
        if self.to == "dense":
            dense = dequantize(held, torch.float32) if isinstance(held, QuantizedWeight) else held
            merged = self._with_adapter(dense, key.removesuffix(".weight"))
            return {key: natural_linear(merged.to(self.dtype), layer)}
        qw = held if isinstance(held, QuantizedWeight) else quantize(held, fmt)
        if self.to == "bitsandbytes":
            fields = self.config.bitsandbytes or {}
            storage = getattr(torch, fields.get("bnb_4bit_quant_storage", "uint8"))
            return to_state_dict(qw, f"{key}.", storage)
        module = key.removesuffix(".weight")
        return {f"{module}.{name}": p.data for name, p in parameters_of(qw).items()}

    def _convert_stack(self, stack: Stack, files: list[str]) -> dict[str, torch.Tensor]:
        names, fmt = self.skeleton.names, self.config.storage
        if self.checkpoint.kind == "dense":
            dense = names.merge(stack, files, self.checkpoint.tensor)
            return names.renamed(quantize_stack(stack, dense, fmt))
        held = {names.in_model(name)[0]: self.checkpoint.tensor(name) for name in files}
        if self.to != "dense":
            return names.renamed(held)
        dense = dequantize_stack(stack, held, fmt, self.weight_dtype, self.dtype)
        return names.split({stack.name: dense})

    def _adapter_of(self, module: str) -> Any:
        for name in (module, f"{self.prefix}.{module}"):
            if name in self.adapter:
                self.merged.add(name)
                return self.adapter[name]
        return None

    def _with_adapter(self, weight: torch.Tensor, module: str) -> torch.Tensor:
        found = self._adapter_of(module)
        if found is None:
            return weight
        a, b, scaling = found
        if tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise CheckpointError(f"convert: the adapter of {module} does not fit {weight.shape}")
        return weight.float() + scaling * (b.float() @ a.float())

    def check(self) -> None:
        """Every adapter has found its weight."""
        missing = sorted(name for name in self.adapter if not self._is_there(name))
        if missing:
            raise CheckpointError(
                f"convert: the adapter's {missing[0]} and {len(missing) - 1} more are not in SRC"
            )

    def _is_there(self, name: str) -> bool:
        files = self.checkpoint.files
        return (
            f"{name}.weight" in files or f"{name.removeprefix(self.prefix + '.')}.weight" in files
        )

    def result_config(self) -> dict[str, Any]:
        """config.json of the result."""
        fields = dict(self.checkpoint.config)
        fields.pop("quantization_config", None)
        if self.to == "dense":
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
            fields.pop("torch_dtype", None)
        elif self.to == "bitsandbytes":
            fields["quantization_config"] = bitsandbytes_config(self.config)
        else:
            ours = self.config.fields()
            fields["quantization_config"] = {**ours, "checkpoint": "qlora_kernels"}
            fields["quantization_config"]["bitsandbytes"] = None
        return fields


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
