"""What a conversion makes of a checkpoint's weights, one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_kernels.errors import ArgumentError, CheckpointError, argument_error
from qlora_kernels.formats.bitsandbytes import to_state_dict
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.integrations.checkpoints import (
    Checkpoint,
    Layer,
    check_contents,
    groups,
    natural_linear,
    read_weight,
    skeleton_of,
)
from qlora_kernels.integrations.convert_adapter import Delta, read_deltas
from qlora_kernels.integrations.convert_experts import Stack, dequantize_stack, quantize_stack
from qlora_kernels.integrations.loading import parameters_of
from qlora_kernels.integrations.saving import bitsandbytes_config
from qlora_kernels.ops import dequantize, quantize


class Job:
    """What is converted into what."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        to: str,
        dtype: torch.dtype,
        adapter: str | Path | None,
    ) -> None:
        self.checkpoint, self.to, self.dtype = checkpoint, to, dtype
        self.skeleton = skeleton_of(checkpoint, config)
        self.config = self.skeleton.config
        if to == "bitsandbytes" and self.skeleton.stacks:
            first = next(iter(self.skeleton.stacks))
            raise argument_error(
                "convert", "SRC", "without quantized experts (bitsandbytes has none)", first
            )
        self.weight_dtype = getattr(torch, self.config.weight_dtype)
        self.deltas = {} if adapter is None else self._read_deltas(adapter)
        if checkpoint.kind == to == "dense":  # its experts stay as they are, unless adapted
            self.skeleton = replace(self.skeleton, stacks={})
        for name in self.deltas:
            shape = self.skeleton.names.shapes.get(name, ())
            if len(shape) == 3 and name not in self.skeleton.stacks:
                self.skeleton.stacks[name] = Stack(name, shape, False, is_quantized=False)

    def _read_deltas(self, adapter: str | Path) -> dict[str, Delta]:
        """What an adapter adds, by the model's names, or by a file's for a single expert's matrix.

        Raises:
            CheckpointError: an adapter of another model.
        """
        names, files = self.skeleton.names, self.checkpoint.files
        where = {name: names.in_model(name) for name in files}
        parts = {}
        if self.checkpoint.kind == "dense":
            inside = [name for name, (_, pattern) in where.items() if pattern is not None]
            parts = {name: self.checkpoint.shape(name)[0] for name in inside}
        there = {place for place, _ in where.values()}
        return read_deltas(
            adapter,
            {name: shape for name, shape in names.shapes.items() if name in there},
            self.skeleton.turned,
            self.skeleton.is_transposed,
            self.skeleton.prefix,
            parts,
        )

    def sizes(self) -> Any:
        """(name, layer, tensor names, bytes of the result), one by one.

        Raises:
            CheckpointError: a weight that SRC lacks, or has in another size.
        """
        fmt = self.config.storage
        found = groups(self.checkpoint, self.skeleton)
        check_contents(self.checkpoint, self.skeleton, found)
        for key, layer, names in found:
            is_dense = isinstance(layer, Stack) and not layer.is_quantized
            if layer is None or is_dense or self.to == "dense":
                shape, width = self.checkpoint.shape(names[0])
                numel = torch.Size(shape if layer is None else layer.shape).numel()
                size = numel * (self.dtype.itemsize if self.to == "dense" else width)
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
        delta = self._delta_of(key)
        if layer is None:
            tensor = self.checkpoint.tensor(names[0])
            if self.to == "dense" and tensor.is_floating_point():
                return {key: self._merged(tensor, delta, self.dtype)}
            return {key: self._merged(tensor, delta, tensor.dtype)}
        fmt = self.config.storage
        delta = None if delta is None else delta.turned(layer.transposed)
        held = read_weight(self.checkpoint, key, layer, names, fmt, self.weight_dtype)
        # bitsandbytes' files have embeddings dense.
        is_dense = self.to == "dense" or (self.to == "bitsandbytes" and layer.is_embedding)
        if is_dense:
            dtype = self.dtype if self.to == "dense" else held.dtype
            dense = dequantize(held, torch.float32) if isinstance(held, QuantizedWeight) else held
            return {key: natural_linear(self._merged(dense, delta, dtype), layer)}
        if delta is not None:
            dense = dequantize(held, torch.float32) if isinstance(held, QuantizedWeight) else held
            held = self._merged(dense, delta, held.dtype)
        qw = held if isinstance(held, QuantizedWeight) else quantize(held, fmt)
        if self.to == "bitsandbytes":
            fields = self.config.bitsandbytes or {}
            storage = getattr(torch, fields.get("bnb_4bit_quant_storage", "uint8"))
            return to_state_dict(qw, f"{key}.", storage)
        module = key.removesuffix(".weight")
        return {f"{module}.{name}": p.data for name, p in parameters_of(qw).items()}

    def _convert_stack(self, stack: Stack, files: list[str]) -> dict[str, torch.Tensor]:
        names, fmt = self.skeleton.names, self.config.storage
        delta = self.deltas.get(stack.name)
        if self.checkpoint.kind == "dense" or not stack.is_quantized:
            dense = names.merge(stack, files, self._read_part)
            if not stack.is_quantized:
                dtype = self.dtype if self.to == "dense" else dense.dtype
                return names.split({stack.name: self._merged(dense, delta, dtype)})
            turned = None if delta is None else delta.turned(stack.transposed)
            dense = self._merged(dense, turned, dense.dtype)
            return names.renamed(quantize_stack(stack, dense, fmt))
        held = {names.in_model(name)[0]: self.checkpoint.tensor(name) for name in files}
        if self.to != "dense" and delta is None:
            return names.renamed(held)
        dtype = self.dtype if self.to == "dense" else self.weight_dtype
        dense = dequantize_stack(stack, held, fmt, self.weight_dtype, dtype, delta)
        if self.to != "dense":
            return names.renamed(quantize_stack(stack, stack.turned(dense), fmt))
        return names.split({stack.name: dense})

    def _read_part(self, name: str) -> torch.Tensor:
        """A tensor that a stack is made of, with what an adapter of it alone adds."""
        tensor = self.checkpoint.tensor(name)
        is_part = self.skeleton.names.in_model(name)[1] is not None
        return self._merged(tensor, self.deltas.get(name) if is_part else None, tensor.dtype)

    def _delta_of(self, name: str) -> Delta | None:
        """What is added to a file's tensor."""
        place, pattern = self.skeleton.names.in_model(name)
        return self.deltas.get(name if pattern is not None else place)

    @staticmethod
    def _merged(dense: torch.Tensor, delta: Delta | None, dtype: torch.dtype) -> torch.Tensor:
        return dense.to(dtype) if delta is None else delta.added(dense, dtype)

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
