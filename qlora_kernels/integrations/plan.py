"""plan: the memory of a QLoRA fine-tuning run, before there is a run.

Weights, adapters, gradients and optimizer states are counted over the model as it would be built.
What backward keeps is measured: one and two layers of the model run without values (torch's
FakeTensorMode), and the others are as the second.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.integrations.experts import stored_parameters
from qlora_kernels.integrations.optional import require
from qlora_kernels.nn import QuantizedExperts, StoredWeight
from qlora_kernels.nn.qlora_linear import QLoRALinear

# Bytes per trained parameter: two fp32 moments; two 8-bit ones, with a fp32 scale for 256 each. A
# paged optimizer has them on the device as long as there is room, an offloaded one never.
OPTIMIZERS = {
    "adamw": 8.0,
    "adamw-fused": 8.0,
    "adamw-8bit": 2.0 + 8 / 256,
    "paged-adamw": 8.0,
    "paged-adamw-8bit": 2.0 + 8 / 256,
    "offload-adamw": 0.0,
    "sgd": 0.0,
}

# Model sizes that papers quote: (vocabulary, hidden, intermediate, layers, heads, key-value heads),
# from the configuration files of the released models.
SHAPES = {
    "llama-7b": (32000, 4096, 11008, 32, 32, 32),
    "llama-13b": (32000, 5120, 13824, 40, 40, 40),
    "llama-33b": (32000, 6656, 17920, 60, 52, 52),
    "llama-65b": (32000, 8192, 22016, 80, 64, 64),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Plan:
    """Bytes of each part of a training step's peak.

    Attributes:
        codes, scales: of the quantized weights.
        dense: parameters that are not quantized (embeddings, norms, output layer).
        adapters, gradients, optimizer: of what is trained.
        activations: what backward keeps; with checkpointing the layers' inputs and either the
            loss's part or one layer's recomputation.
        logits: gradients of the logits and of their fp32 copy, 0 where the peak is elsewhere.
    """

    codes: int
    scales: int
    dense: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = {**vars(self), "total": self.total}
        return "\n".join(f"{name:<12}{_shown(size)}" for name, size in parts.items())


def _shown(size: int) -> str:
    return f"{size / 2**30:9.2f} GiB" if size >= 2**30 else f"{size / 2**20:9.2f} MiB"


def config_of(model: str) -> Any:
    """A model's configuration: one of `SHAPES`, or what transformers finds under a path or name.

    Raises:
        ArgumentError: not of a causal language model, or none at all.
        ImportError: transformers is not installed.
    """
    transformers = require("transformers", "plan")
    if model not in SHAPES:
        try:
            found = transformers.AutoConfig.from_pretrained(model)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            rule = f"{', '.join(SHAPES)}, or a folder or hub id with a configuration"
            raise argument_error("plan", "MODEL", rule, f"{model} ({reason})") from error
        if type(found) not in transformers.AutoModelForCausalLM._model_mapping:
            raise argument_error(
                "plan", "MODEL", "a causal language model", f"{model}, a {type(found).__name__}"
            )
        return found
    vocabulary, hidden, intermediate, layers, heads, kv_heads = SHAPES[model]
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
    )


def plan_memory(
    config: Any,
    *,
    batch: int = 1,
    seq_len: int = 512,
    rank: int = 64,
    dropout: float = 0.0,
    format: str = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = True,
    optimizer: str = "adamw",
) -> Plan:
    """Plan a run that adapts every linear layer of a causal language model but its output layer,
    and the experts that are quantized.

    Args:
        config: transformers' configuration of a decoder-only model.
        batch, seq_len: sequences of a step, tokens of a sequence.
        rank, dropout: of the adapters.
        format, block_size, double_quant: see `qlora_kernels.quantize`.
        dtype: of dense parameters and activations.
        checkpointing: recompute each layer in backward.
        optimizer: one of `OPTIMIZERS`.

    Raises:
        ArgumentError: an unknown optimizer, a batch, seq_len or rank below 1.
        ImportError: transformers is not installed.
    """
    for name, number in (("batch", batch), ("seq_len", seq_len), ("rank", rank)):
        if number < 1:
            raise argument_error("plan", name, "at least 1", number)
    if optimizer not in OPTIMIZERS:
        raise argument_error("plan", "optimizer", f"one of {tuple(OPTIMIZERS)}", repr(optimizer))
    options: dict[str, Any] = {
        "format": format,
        "block_size": block_size,
        "double_quant": double_quant,
    }
    options |= {"rank": rank, "dropout": dropout}
    layers = config.get_text_config().num_hidden_layers
    counts = _counts(config, dtype, options, layers)
    one, two = (_saved(config, dtype, options, n, batch, seq_len) for n in (1, 2))
    per_layer, rest = two - one, 2 * one - two
    text = config.get_text_config()
    inputs = batch * seq_len * text.hidden_size * dtype.itemsize
    logits = batch * seq_len * text.vocab_size * (4 + dtype.itemsize)
    kept = layers * per_layer + rest
    if checkpointing:
        # The loss's part is gone when the first layer is recomputed: the larger one is the peak,
        # and beside a layer there are its gradient and that of the one before.
        recomputed = per_layer + 2 * inputs
        kept = layers * inputs + rest
        if recomputed > rest + logits:
            kept, logits = layers * inputs + recomputed, 0
    return Plan(
        **counts,
        gradients=counts["adapters"],
        optimizer=int(counts["adapters"] / 4 * OPTIMIZERS[optimizer]),
        activations=kept,
        logits=logits,
    )


def _build(config: Any, dtype: torch.dtype, options: dict[str, Any], layers: int) -> nn.Module:
    """The adapted model with so many layers, without values."""
    import transformers

    from qlora_kernels.integrations.transformers import QLoRAKernelsConfig, QLoRAKernelsQuantizer

    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = layers
    if getattr(config.get_text_config(), "layer_types", None):
        config.get_text_config().layer_types = config.get_text_config().layer_types[:layers]
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    chosen = {k: options[k] for k in ("format", "block_size", "double_quant")}
    quantizer = QLoRAKernelsQuantizer(QLoRAKernelsConfig(**chosen), pre_quantized=False)
    quantizer.preprocess_model(model)
    return model


def _counts(
    config: Any, dtype: torch.dtype, options: dict[str, Any], layers: int
) -> dict[str, int]:
    with torch.device("meta"):
        model = _build(config, dtype, options, layers)
    codes = scales = adapters = 0
    stored: set[int] = set()
    for module in model.modules():
        if isinstance(module, StoredWeight):
            weights, experts = [module.quantized_weight], 1
            stored |= {id(p) for n, p in module.named_parameters() if n != "bias"}
        elif isinstance(module, QuantizedExperts):
            weights, experts = list(module.projections.values()), module.num_experts
            stored |= {id(module._parameters[name]) for name in stored_parameters(module)}
        else:
            continue
        for weight in weights:
            codes += experts * weight.codes.nbytes
            scales += experts * (weight.nbytes - weight.codes.nbytes)
            adapters += experts * 4 * options["rank"] * sum(weight.shape)
    dense = sum(p.nbytes for p in model.parameters() if id(p) not in stored)
    return {"codes": codes, "scales": scales, "dense": dense, "adapters": adapters}


def _saved(
    config: Any, dtype: torch.dtype, options: dict[str, Any], layers: int, batch: int, seq_len: int
) -> int:
    """Bytes that autograd holds after a forward of so many layers, parameters left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = _build(config, dtype, options, layers)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredWeight) and isinstance(module, nn.Linear):
                empty = QuantizedWeight.empty(module.weight_shape, dtype, module.format, "cpu")
                adapted = QLoRALinear(
                    empty,
                    module.bias,
                    rank=options["rank"],
                    dropout=options["dropout"],
                )
                model.set_submodule(name, adapted)
            elif isinstance(module, QuantizedExperts):
                for key, like in module.projections.items():
                    empty = QuantizedWeight.empty(like.shape, dtype, like.format, "cpu")
                    module.hold(key, [empty] * module.num_experts)
                    module.add_adapter(key, rank=options["rank"], alpha=1.0)
        return saved_bytes(model.train(), torch.zeros(batch, seq_len, dtype=torch.int64))


def saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes of the storages that autograd holds after a language-modelling forward, parameters
    left out."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(found.values())
