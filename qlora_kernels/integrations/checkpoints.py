"""transformers' checkpoint folders, read tensor by tensor: dense, this library's, bitsandbytes'."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qlora_kernels.errors import CheckpointError, argument_error
from qlora_kernels.formats.bitsandbytes import from_state_dict
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight, is_table_of, values_of
from qlora_kernels.integrations.convert_experts import FIELDS, Names, Stack
from qlora_kernels.integrations.loading import is_transposed
from qlora_kernels.integrations.peft import some
from qlora_kernels.nn import QuantizedEmbedding, QuantizedExperts, StoredWeight

KINDS = ("dense", "qlora_kernels", "bitsandbytes")
CONFIG, INDEX = "config.json", "model.safetensors.index.json"


@dataclass(frozen=True)
class Layer:
    """A layer whose weight is, or is to be, quantized.

    Attributes:
        name: of the model's module.
        shape: (N, K).
        transposed: a dense checkpoint has it as [K, N].
        is_embedding: its weight is a table.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    is_embedding: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The weight's shape in a dense checkpoint."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        folder: where.
        config: config.json.
        files: tensor name -> file that holds it.
        kind: one of `KINDS`.
    """

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    kind: str
    _open: dict[Path, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from its file.

        Raises:
            CheckpointError: the file is truncated or holds no such tensor.
        """
        path = self.files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            tensor: torch.Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"convert: {path} cannot be read: {error}") from error
        return tensor

    def shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """Shape of a tensor, and bytes of an element, without its values."""
        if self.files[name] not in self._open:
            self.tensor(name)
        part = self._open[self.files[name]].get_slice(name)
        bits = {"BF16": 16, "BOOL": 8}.get(part.get_dtype(), 0)
        return tuple(part.get_shape()), (bits or int(part.get_dtype()[1:])) // 8


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: no config.json or safetensors there, or of a quantization method that is
            neither ours nor bitsandbytes' 4-bit.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"convert: {folder / CONFIG} cannot be read: {error}") from error
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                files.update(dict.fromkeys(opened.keys(), file))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"convert: {file} cannot be read: {error}") from error
    if not files:
        raise CheckpointError(f"convert: {folder} holds no *.safetensors file")
    stored = config.get("quantization_config")
    kind = "dense" if stored is None else stored.get("quant_method")
    if kind not in KINDS or (kind == "bitsandbytes" and not stored.get("load_in_4bit")):
        raise CheckpointError(f"convert: {folder} is quantized by {kind!r}, which is not read here")
    return Checkpoint(folder, config, files, kind)


@dataclass(frozen=True)
class Skeleton:
    """What a quantizer makes of the checkpoint's model.

    Attributes:
        layers: the layers it quantizes, by name.
        stacks: the experts' projections it quantizes, by name.
        names: how names in files and in the model relate.
        prefix: name of the model's body, which a checkpoint of the body alone leaves out.
        turned: names of the linear layers whose dense weight is [K, N].
        is_transposed: names of the modules of experts that say they are.
        config: the quantizer's configuration, completed.
    """

    layers: dict[str, Layer]
    stacks: dict[str, Stack]
    names: Names
    prefix: str
    turned: frozenset[str]
    is_transposed: frozenset[str]
    config: Any


def skeleton_of(checkpoint: Checkpoint, config: Any) -> Skeleton:
    """The model of a checkpoint under this configuration of the quantizer.

    Raises:
        ArgumentError: an architecture that transformers does not have.
    """
    import transformers

    from qlora_kernels.integrations.transformers import QLoRAKernelsQuantizer

    name = (checkpoint.config.get("architectures") or [None])[0]
    cls = getattr(transformers, name, None) if name else None
    if cls is None:
        raise argument_error("convert", "architectures", "a class of transformers", repr(name))
    model_config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    with torch.device("meta"):
        model: Any = cls(model_config)
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if stored is not None:
        model.to(getattr(torch, stored))
    transposed = frozenset(n for n, module in model.named_modules() if is_transposed(module))
    says_so = frozenset(n for n, m in model.named_modules() if getattr(m, "is_transposed", False))
    names = Names(model)
    quantizer = QLoRAKernelsQuantizer(config, pre_quantized=checkpoint.kind != "dense")
    quantizer.preprocess_model(model, dtype=model.dtype)
    # What a checkpoint may lack: it is another tensor, or the class says so.
    optional = [rf"^{re.escape(key)}$" for key in model.all_tied_weights_keys]
    optional += model._keys_to_ignore_on_load_missing or ()
    layers, stacks = {}, {}
    for layer_name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for projection, like in module.projections.items():
                full = f"{layer_name}.{projection}"
                shape = (module.num_experts, *like.shape)
                stacks[full] = Stack(full, shape, module.source_is_transposed)
        elif isinstance(module, StoredWeight) and not any(
            re.search(pattern, f"{layer_name}.weight") for pattern in optional
        ):
            layers[layer_name] = Layer(
                layer_name,
                module.weight_shape,
                layer_name in transposed,
                isinstance(module, QuantizedEmbedding),
            )
    prefix, completed = model.base_model_prefix, quantizer.quantization_config
    return Skeleton(layers, stacks, names, prefix, transposed, says_so, completed)


def groups(
    checkpoint: Checkpoint, skeleton: Skeleton
) -> list[tuple[str, Layer | Stack | None, list[str]]]:
    """(name, layer, stack or None, tensor names) for each weight that is converted as one, in the
    order of names: a stack's is the model's, others are the files'."""
    stored = FIELDS if checkpoint.kind == "qlora_kernels" else ("",)
    in_stack = {
        f"{name}{end}": stack
        for name, stack in skeleton.stacks.items()
        for end in (stored if stack.is_quantized else ("",))
    }
    taken: dict[str, tuple[Layer | Stack | None, list[str]]] = {}
    for name in checkpoint.files:
        stack = in_stack.get(skeleton.names.in_model(name)[0])
        if stack is not None:
            taken.setdefault(stack.name, (stack, []))[1].append(name)
            continue
        module, owner = name, None
        while "." in module and owner is None:
            module, _, end = module.rpartition(".")
            if end.split("_")[0] == "weight":
                place = skeleton.names.in_model(f"{module}.weight")[0]
                owner = skeleton.layers.get(place.removesuffix(".weight"))
        key = name if owner is None else f"{module}.weight"
        taken.setdefault(key, (owner, []))[1].append(name)
    return [(key, *taken[key]) for key in sorted(taken)]


def check_contents(
    checkpoint: Checkpoint, skeleton: Skeleton, found: list[tuple[str, Layer | Stack | None, Any]]
) -> None:
    """Whether a checkpoint has all that the quantizer is to read, in the sizes it should have.

    Args:
        found: the weights, as `groups` gives them.

    Raises:
        CheckpointError: a tensor that no file has, or of another size.
    """
    owners = {owner.name for _, owner, _ in found if owner is not None}
    lost = [name for name in (*skeleton.layers, *skeleton.stacks) if name not in owners]
    fmt = skeleton.config.storage
    for key, owner, names in found:
        if isinstance(owner, Layer) and checkpoint.kind == "dense":
            _check_shape(checkpoint, names[0], owner.stored_shape)
        elif isinstance(owner, Stack) and not owner.is_quantized:
            continue
        elif owner is not None and checkpoint.kind == "qlora_kernels":
            # A stack's are by the model's names, a layer's by those of the files.
            is_stack, experts = isinstance(owner, Stack), torch.Size(owner.shape[:-2]).numel()
            held = {skeleton.names.in_model(n)[0] if is_stack else n: n for n in names}
            for field, (count, _) in fmt.tensor_sizes(owner.shape[-2:]).items():
                name = key if field == "codes" else f"{key}_{field}"
                if name in held:
                    _check_size(checkpoint, held[name], count * experts, owner.shape, fmt)
                else:
                    lost.append(name)
    if lost:
        raise CheckpointError(f"convert: {checkpoint.folder} lacks {some(lost)}")


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    got = checkpoint.shape(name)[0]
    if got != shape:
        file = checkpoint.files[name]
        raise CheckpointError(f"convert: {file} has {name} as {got}, its config {shape}")


def _check_size(
    checkpoint: Checkpoint, name: str, wanted: int, shape: tuple[int, ...], fmt: Format
) -> None:
    got = torch.Size(checkpoint.shape(name)[0]).numel()
    if got != wanted:
        raise CheckpointError(
            f"convert: {checkpoint.files[name]} has {got} elements of {name}, and its config asks "
            f"for {wanted} ({fmt.name}, block size {fmt.block_size}, weight {shape})"
        )


def read_weight(
    checkpoint: Checkpoint, key: str, layer: Layer, names: list[str], fmt: Format, dtype: Any
) -> torch.Tensor | QuantizedWeight:
    """A weight of a layer: [N, K] if the checkpoint is dense, else as it is stored."""
    tensors = {name: checkpoint.tensor(name) for name in names}
    if checkpoint.kind == "dense":
        weight = tensors[key]
        return weight.t().contiguous() if layer.transposed else weight
    if checkpoint.kind == "bitsandbytes":
        return from_state_dict(tensors, f"{key}.")
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        part = name.removeprefix(key).removeprefix("_") or "codes"
        parts[part] = values_of(tensor, part, fmt)
    if not is_table_of(parts.pop("codebook", None), fmt):
        raise CheckpointError(f"convert: {key}_codebook is not the table of format {fmt.name!r}")
    codes = parts.pop("codes")
    return QuantizedWeight.from_parts(codes, shape=layer.shape, dtype=dtype, format=fmt, **parts)


def natural_linear(weight: torch.Tensor, layer: Layer) -> torch.Tensor:
    """A dense weight as a dense checkpoint has it."""
    return nn.Parameter(weight.t() if layer.transposed else weight, False).data.contiguous()
