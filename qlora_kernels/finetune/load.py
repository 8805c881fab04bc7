"""Load the base model and its tokenizer, and turn it into what a method trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qlora_kernels.errors import QLKError, argument_error
from qlora_kernels.finetune.base_model import WEIGHTS
from qlora_kernels.finetune.data import ByteTokenizer, PretrainedTokenizer, Tokenizer
from qlora_kernels.finetune.model import ByteLlama
from qlora_kernels.finetune.settings import Settings, derived_seed
from qlora_kernels.nn import lora_parameters, replace_linear


@dataclass(frozen=True)
class BaseModel:
    """A dense model as loaded, its vocabulary and the most positions it takes (None: any)."""

    model: nn.Module
    vocab_size: int
    max_positions: int | None


def load_tokenizer(settings: Settings) -> Tokenizer:
    """The model's own tokenizer; bytes for the embedded model. Raises as `load_base`."""
    if settings.model is None:
        return ByteTokenizer()
    transformers = import_transformers()
    return PretrainedTokenizer(from_pretrained(transformers.AutoTokenizer, settings.model))


def load_base(settings: Settings) -> BaseModel:
    """The dense model on the CPU: in fp32 for full fine-tuning, else in the run's dtype.

    Raises:
        QLKError: transformers is not installed, or does not load ``settings.model``.
    """
    dtype = torch.float32 if settings.method == "full" else settings.torch_dtype
    if settings.model is None:
        embedded = ByteLlama()
        weights = {name: tensor.to(dtype) for name, tensor in load_file(WEIGHTS).items()}
        embedded.load_state_dict(weights, assign=True)
        return BaseModel(embedded, embedded.config.vocab_size, embedded.config.max_positions)
    transformers = import_transformers()
    model = from_pretrained(transformers.AutoModelForCausalLM, settings.model, dtype=dtype)
    model.config.use_cache = False  # keys and values of past tokens, of no use in training
    vocab_size = model.get_input_embeddings().num_embeddings
    return BaseModel(model, vocab_size, getattr(model.config, "max_position_embeddings", None))


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
            "finetune", "--model", "a causal language model that transformers loads", f"{name} ({reason})"
        ) from error


def prepare(base: BaseModel, settings: Settings) -> nn.Module:
    """Make ``base.model`` what ``settings.method`` trains, in place, on the run's device.

    Full fine-tuning trains every parameter. LoRA and QLoRA freeze them and convert the targeted
    linear layers one at a time, so that QLoRA holds one dense weight beside the quantized ones.

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
        add_adapters(model, settings)
    return model.to(settings.torch_device)


def add_adapters(model: nn.Module, settings: Settings) -> None:
    """`replace_linear` with the run's options; see `prepare` for what it raises."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise argument_error(
            "finetune", "--model", "a model with linear layers (nn.Linear)", "one with none"
        )
    torch.manual_seed(derived_seed(settings.seed, "adapters", 0))
    replace_linear(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        target=settings.targets[0] if settings.targets == ("all-linear",) else settings.targets,
        quantize=settings.method == "qlora",
        format=settings.format,
        block_size=settings.block_size,
        double_quant=settings.double_quant,
        dropout=settings.dropout,
    )
    if not any(True for _ in lora_parameters(model)):
        raise argument_error(
            "finetune", "--targets", "names of linear layers", ", ".join(settings.targets)
        )


def base_model_name(settings: Settings) -> str:
    """What an adapter's configuration names as its base."""
    return settings.model or Path(WEIGHTS).parent.name
