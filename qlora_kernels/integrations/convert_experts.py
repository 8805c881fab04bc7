"""Mixtures of experts in checkpoint files: matrices that files hold one by one, or as 3-D tensors,
and that a model holds as one stack a projection. transformers' own conversions say which is which.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from qlora_kernels.errors import CheckpointError
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import (
    TENSOR_FIELDS,
    QuantizedWeight,
    is_table_of,
    values_of,
)
from qlora_kernels.integrations.convert_adapter import Delta
from qlora_kernels.nn.quantized_experts import expert_parameters
from qlora_kernels.ops import dequantize, quantize

# Fields of a quantized stack's tensors, by what follows the projection's name.
FIELDS = {"" if field == "codes" else f"_{field}": field for field in (*TENSOR_FIELDS, "codebook")}


class Stack:
    """A projection of a layer's experts.

    Attributes:
        name: of the model's parameter, as `model.layers.0.mlp.experts.down_proj`.
        shape: (experts, N, K).
        transposed: a dense checkpoint has the matrices as [K, N].
        is_quantized: the quantizer takes it; else it is dense in any checkpoint.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], transposed: bool, is_quantized: bool = True
    ) -> None:
        self.name, self.shape, self.transposed = name, shape, transposed
        self.is_quantized = is_quantized

    def turned(self, dense: torch.Tensor) -> torch.Tensor:
        """A dense stack from the layout of files to [experts, N, K], or back."""
        return dense.transpose(1, 2).contiguous() if self.transposed else dense


class Names:
    """How the names in a checkpoint's files and those of the dense model's parameters relate.

    Args:
        model: the dense model, without values.

    Attributes:
        shapes: of the model's parameters.
    """

    def __init__(self, model: Any) -> None:
        self._config, self._prefix = model.config, model.base_model_prefix
        self._held = dict(model.state_dict())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._held.items()}
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._order = mapping

    def in_model(self, name: str) -> tuple[str, str | None]:
        """The parameter that a file's tensor goes to, and the pattern by which it is a part of it
        (None: it is all of it)."""
        place: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._held
        )
        return place

    def merge(
        self, stack: Stack, parts: Sequence[str], read: Callable[[str], torch.Tensor]
    ) -> torch.Tensor:
        """The stack [experts, N, K] of a dense checkpoint's tensors.

        Raises:
            CheckpointError: they do not make one of that shape.
        """
        found: Any = None
        if len(parts) == 1 and self.in_model(parts[0])[1] is None:
            found = read(parts[0])
        else:
            owners = {pattern: c for c in self._converters for pattern in c.source_patterns}
            converter: Any = None
            for name in sorted(parts, key=dot_natural_key):
                place, pattern = self.in_model(name)
                if pattern is None:
                    raise CheckpointError(f"convert: SRC holds {place} as a whole and in parts")
                converter = converter or copy.deepcopy(owners[pattern])
                converter.add_tensor(place, name, pattern, read(name))
            found = converter.convert(stack.name, config=self._config)[stack.name]
            found = found[0] if isinstance(found, list) else found
        tensor = stack.turned(found)
        if tuple(tensor.shape) != stack.shape:
            raise CheckpointError(
                f"convert: SRC has {stack.name} as {tuple(tensor.shape)}, its config {stack.shape}"
            )
        return tensor

    def split(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Dense tensors by the model's names, as a dense checkpoint has them."""
        return self._revert(tensors, [e for e in self._order if self._is_kept(e)])

    def renamed(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the model's names, by the names of files, none taken apart."""
        return self._revert(
            tensors,
            [e for e in self._order if isinstance(e, WeightRenaming) and self._is_kept(e)],
        )

    def _is_kept(self, entry: Any) -> bool:
        """Renamings that no name of the source asked for are not taken back."""
        return isinstance(entry, WeightConverter) or entry.was_used()

    def _revert(
        self, tensors: Mapping[str, torch.Tensor], mapping: list[Any]
    ) -> dict[str, torch.Tensor]:
        model: Any = SimpleNamespace(_weight_conversions=mapping or None, config=self._config)
        if not mapping:
            return dict(tensors)
        found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
        return {name: tensor.contiguous() for name, tensor in found.items()}


def quantize_stack(stack: Stack, dense: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    """The tensors of a quantized stack, by the model's names."""
    path, _, projection = stack.name.rpartition(".")
    experts = [quantize(matrix, fmt) for matrix in dense]
    return {f"{path}.{key}": p.data for key, p in expert_parameters(projection, experts).items()}


def dequantize_stack(
    stack: Stack,
    tensors: Mapping[str, torch.Tensor],
    fmt: Format,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    delta: Delta | None = None,
) -> torch.Tensor:
    """The dense stack, as files have it, of a quantized one's tensors, by the model's names.

    Args:
        delta: what is added to it as files have it.

    Raises:
        CheckpointError: tensors that are missing, or of another format.
    """
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        field = FIELDS[name.removeprefix(stack.name)]
        parts[field] = values_of(tensor, field, fmt)
    if not is_table_of(parts.pop("codebook", None), fmt):
        raise CheckpointError(
            f"convert: {stack.name}_codebook is not the table of format {fmt.name!r}"
        )
    experts, *shape = stack.shape
    if any(part.shape[0] != experts for part in parts.values()):
        raise CheckpointError(f"convert: SRC has {stack.name} of other than {experts} experts")
    dense = torch.empty(stack.shape, dtype=dtype)
    for expert in range(experts):
        held: dict[str, Any] = {field: part[expert] for field, part in parts.items()}
        codes = held.pop("codes")
        matrix = QuantizedWeight.from_parts(
            codes, shape=tuple(shape), dtype=weight_dtype, format=fmt, **held
        )
        if delta is None:
            dequantize(matrix, dtype, out=dense[expert])
        else:
            added = delta.turned(stack.transposed).matrix(expert)
            dense[expert] = dequantize(matrix, torch.float32).add_(added)
    return stack.turned(dense)
