"""Load the base model and its tokenizer, and turn it into what a method trains.

A pretrained model for QLoRA is loaded by transformers with this library's quantizer, weight by
weight: the dense model is never there as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qlora_kernels.errors import QLKError, argument_error
from qlora_kernels.finetune import base_model
from qlora_kernels.finetune.base_model import WEIGHTS
from qlora_kernels.finetune.console import say
from qlora_kernels.finetune.data import ByteTokenizer, PretrainedTokenizer, Tokenizer
from qlora_kernels.finetune.model import ByteLlama
from qlora_kernels.finetune.settings import Settings, derived_seed, option
from qlora_kernels.formats import get_format
from qlora_kernels.nn import ExpertAdapter, QuantizedExperts, replace_linear
from qlora_kernels.nn.conv1d import as_linear, is_linear
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
        ArgumentError: transformers does not load ``settings.model``, it is an encoder, or it is
            quantized and the method is not qlora.
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
    check_causal(model, settings.model)
    model.config.use_cache = False  # keys and values of past tokens, of no use in training
    vocab_size = model.get_input_embeddings().num_embeddings
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    max_positions = getattr(model.config, "max_position_embeddings", None)
    return BaseModel(model, vocab_size, max_positions, names[0] if names else "lm_head")


@torch.no_grad()
def check_causal(model: Any, name: str) -> None:
    """Whether tokens are predicted from those before them alone: transformers takes encoders too
    for causal language models, whose loss here would be that of copying.

    Raises:
        ArgumentError: an encoder.
    """
    if getattr(model.config, "is_decoder", None) is not False:
        return
    some_ids = torch.tensor([[2, 3, 2, 3], [2, 3, 2, 2]], device=model.device)
    first, second = (model(input_ids=ids[None]).logits[:, :-1] for ids in some_ids)
    if not torch.equal(first, second):
        rule = "a causal language model"
        got = f"{name}, an encoder (its tokens see those that come after them)"
        raise argument_error("finetune", "--model", rule, got)


def loading_options(model: str, settings: Settings) -> dict[str, Any]:
    """What from_pretrained is told beside the dtype: how to quantize, or to read what is quantized.

    Raises as `load_base`.
    """
    config = from_pretrained(import_transformers().AutoConfig, model)
    how = quantization_of(config).get("quant_method")
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
    stored = stored_quantization(model)
    if how == "bitsandbytes":
        config = QLoRAKernelsConfig.adopt(model)
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


def quantization_of(config: Any) -> dict[str, Any]:
    """The fields of a model configuration's quantization, {} for a dense model."""
    stored: Any = getattr(config, "quantization_config", None) or {}
    fields: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    return fields


def stored_quantization(model: str) -> dict[str, Any]:
    """Format, block size and double quantization of a checkpoint that is taken as it is, by the
    names of `QLoRAKernelsConfig`; {} for any other.

    Raises as `load_base`.
    """
    stored = quantization_of(from_pretrained(import_transformers().AutoConfig, model))
    how = stored.get("quant_method")
    if how not in READ_QUANTIZED:
        return {}
    try:
        from qlora_kernels import QLoRAKernelsConfig
    except ImportError as error:
        raise QLKError(f"finetune: --model: {error}") from error
    if how == "bitsandbytes":
        stored = QLoRAKernelsConfig.adopt(model).quantization_config
    else:
        stored = QLoRAKernelsConfig(**stored).fields()
    return {name: stored[name] for name in ("format", "block_size", "double_quant")}


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
        if name.startswith(("/", ".", "~")) and not Path(name).exists():
            reason = "no such folder"  # which transformers takes for the id of a repository
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
        ArgumentError: a --seq-len beyond the model's positions, one of --targets that matches
            nothing, a --rank above a layer's smaller side.
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
    shapes = adaptable(base)
    if not shapes:
        raise argument_error(
            "finetune",
            "--model",
            "one with linear layers besides its output layer",
            f"{settings.model}, which has none",
        )
    unknown = [
        end
        for end in settings.targets
        if target != "all-linear" and not any(is_targeted(name, (end,)) for name in shapes)
    ]
    if unknown:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in shapes))
        raise argument_error("finetune", "--targets", f"out of {known}", ", ".join(unknown))
    for name, (rows, cols) in shapes.items():
        if is_targeted(name, target) and settings.rank > min(rows, cols):
            rule = f"in 1 … {min(rows, cols)}, for {name} is {rows} x {cols}"
            raise argument_error("finetune", "--rank", rule, settings.rank)
    if target == "all-linear" and (dense := dense_stacks(base.model)):
        say(f"{settings.method}: no adapters for the dense experts of {some(dense)}")
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


def adaptable(base: BaseModel) -> dict[str, tuple[int, int]]:
    """What can get an adapter, linear layers but the output layer and projections of quantized
    experts, by full name: [N, K]."""
    found = {}
    for name, module in base.model.named_modules():
        if is_linear(module) and name != base.head:
            linear = as_linear(module)
            found[name] = (linear.out_features, linear.in_features)
        elif isinstance(module, QuantizedExperts):
            for projection, like in module.projections.items():
                rows, cols = like.shape
                found[f"{name}.{projection}"] = (rows, cols)
    return found


def dense_stacks(model: nn.Module) -> list[str]:
    """Names of the modules that hold dense matrices of experts in 3-D parameters."""
    return [
        name
        for name, module in model.named_modules()
        if any(p.dim() == 3 and p.is_floating_point() for p in module.parameters(recurse=False))
        and not isinstance(module, ExpertAdapter)
    ]


def some(names: list[str]) -> str:
    """Names for a message, the first few of many."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def base_model_name(settings: Settings) -> str:
    """What an adapter's configuration names as its base."""
    return settings.model or base_model.__name__
