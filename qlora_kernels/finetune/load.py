"""Load the base model and its tokenizer, and turn it into what a method trains.

A pretrained model for QLoRA is loaded by transformers with this library's quantizer, weight by
weight: the dense model is never there as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qlora_kernels.errors import QLKError, argument_error
from qlora_kernels.finetune import base_model
from qlora_kernels.finetune.base_model import WEIGHTS
from qlora_kernels.finetune.data import ByteTokenizer, PretrainedTokenizer, Tokenizer
from qlora_kernels.finetune.model import ByteLlama
from qlora_kernels.finetune.settings import Settings, derived_seed, option
from qlora_kernels.formats import get_format
from qlora_kernels.nn import replace_linear
from qlora_kernels.nn.replace import is_targeted

# Kinds of quantized checkpoints that are taken as they are.
READ_QUANTIZED = ("qlora_kernels", "bitsandbytes")


@dataclass(frozen=True)
class BaseModel:
    """A model as loaded, dense or quantized; its vocabulary, the most positions it takes (None:
    any), and the name of its output layer, which gets no adapter."""

    model: nn.Module
    vocab_size: int
    max_positions: int | None
    head: str


def load_tokenizer(settings: Settings) -> Tokenizer:
    """The model's own tokenizer; bytes for the embedded model. Raises as `load_base`."""
    if settings.model is None:
        return ByteTokenizer()
    transformers = import_transformers()
    return PretrainedTokenizer(from_pretrained(transformers.AutoTokenizer, settings.model))


def load_base(settings: Settings) -> BaseModel:
    """The model on the CPU: in fp32 for full fine-tuning, else in the run's dtype; a pretrained one
    for QLoRA with its linear layers quantized.

    Raises:
        ArgumentError: transformers does not load ``settings.model``, or it is quantized and the
            method is not qlora.
        QLKError: transformers or another package that it needs is not installed.
    """
    dtype = torch.float32 if settings.method == "full" else settings.torch_dtype
    if settings.model is None:
        embedded = ByteLlama()
        weights = {name: tensor.to(dtype) for name, tensor in load_file(WEIGHTS).items()}
        embedded.load_state_dict(weights, assign=True)
        config = embedded.config
        return BaseModel(embedded, config.vocab_size, config.max_positions, "lm_head")
    options = loading_options(settings.model, settings)
    auto_class = import_transformers().AutoModelForCausalLM
    model = from_pretrained(auto_class, settings.model, dtype=dtype, **options)
    model.config.use_cache = False  # keys and values of past tokens, of no use in training
    vocab_size = model.get_input_embeddings().num_embeddings
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    max_positions = getattr(model.config, "max_position_embeddings", None)
    return BaseModel(model, vocab_size, max_positions, names[0] if names else "lm_head")


def loading_options(model: str, settings: Settings) -> dict[str, Any]:
    """What from_pretrained is told beside the dtype: how to quantize, or to read what is quantized.

    Raises as `load_base`.
    """
    config = from_pretrained(import_transformers().AutoConfig, model)
    stored: Any = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    how = stored.get("quant_method")
    if how is not None and (settings.method != "qlora" or how not in READ_QUANTIZED):
        rule = f"a dense model, or for --method qlora one that is quantized by {READ_QUANTIZED}"
        raise argument_error("finetune", "--model", rule, f"{model}, by {how!r}")
    if settings.method != "qlora":
        return {}
    try:
        from qlora_kernels import QLoRAKernelsConfig
    except ImportError as error:
        raise QLKError(f"finetune: --model: {error}") from error
    if how is None:
        quantization = QLoRAKernelsConfig(
            format=settings.format,
            block_size=settings.block_size,
            double_quant=settings.double_quant,
        )
        return {"quantization_config": quantization}
    if how == "bitsandbytes":
        config = QLoRAKernelsConfig.adopt(model)
        stored = config.quantization_config
    wanted: dict[str, object] = {"format": settings.format}
    if settings.format == stored["format"]:
        size = settings.block_size or stored["block_size"]
        chosen = get_format(settings.format).override(size, settings.double_quant)
        wanted |= {"block_size": chosen.block_size, "double_quant": chosen.double_quant}
    for name, value in wanted.items():
        if value != stored[name]:
            rule = f"as the model was quantized ({stored[name]})"
            raise argument_error("finetune", option(name), rule, value)
    return {"config": config}


def import_transformers() -> Any:
    """transformers, imported only when a run names a model."""
    try:
        import transformers
    except ImportError as error:
        raise QLKError(
            "finetune: --model needs transformers: pip install 'qlora_kernels[hf]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """``auto_class.from_pretrained(name)`` with its many errors turned into one."""
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise argument_error(
            "finetune",
            "--model",
            "a causal language model that transformers loads",
            f"{name} ({reason})",
        ) from error


def prepare(base: BaseModel, settings: Settings) -> nn.Module:
    """Make ``base.model`` what ``settings.method`` trains, in place, on the run's device.

    Full fine-tuning trains every parameter. LoRA and QLoRA freeze them and convert the targeted
    linear layers one at a time: what is not quantized yet is then, with one dense weight held
    beside the quantized ones.

    Raises:
        ArgumentError: a --seq-len beyond the model's positions, --targets that match no linear
            layer, a --rank above a layer's smaller side.
    """
    model = base.model
    if base.max_positions is not None and settings.seq_len > base.max_positions:
        raise argument_error(
            "finetune", "--seq-len", f"at most the model's {base.max_positions}", settings.seq_len
        )
    for parameter in model.parameters():
        parameter.requires_grad_(settings.method == "full")
    if settings.method != "full":
        add_adapters(base, settings)
    return model.to(settings.torch_device)


def add_adapters(base: BaseModel, settings: Settings) -> None:
    """`replace_linear` with the run's options; see `prepare` for what it raises."""
    target = "all-linear" if settings.targets == ("all-linear",) else settings.targets
    names = [
        name
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and name != base.head
    ]
    if not names:
        raise argument_error(
            "finetune",
            "--model",
            "one with linear layers (nn.Linear) besides its output layer",
            f"{settings.model}, which has none",
        )
    if not any(is_targeted(name, target) for name in names):
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise argument_error(
            "finetune", "--targets", f"out of {known}", ", ".join(settings.targets)
        )
    torch.manual_seed(derived_seed(settings.seed, "adapters", 0))
    replace_linear(
        base.model,
        rank=settings.rank,
        alpha=settings.alpha,
        target=target,
        skip=(base.head,),
        quantize=settings.method == "qlora",
        format=settings.format,
        block_size=settings.block_size,
        double_quant=settings.double_quant,
        dropout=settings.dropout,
    )


def base_model_name(settings: Settings) -> str:
    """What an adapter's configuration names as its base."""
    return settings.model or base_model.__name__
