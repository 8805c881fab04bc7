"""Load the base model and its tokenizer, and turn it into what a method trains."""

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
from qlora_kernels.finetune.settings import Settings, derived_seed
from qlora_kernels.nn import replace_linear
from qlora_kernels.nn.replace import is_targeted


@dataclass(frozen=True)
class BaseModel:
    """A dense model as loaded, its vocabulary, the most positions it takes (None: any), and the
    name of its output layer, which gets no adapter."""

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
    """The dense model on the CPU: in fp32 for full fine-tuning, else in the run's dtype.

    Raises:
        QLKError: transformers is not installed, or does not load ``settings.model``.
    """
    dtype = torch.float32 if settings.method == "full" else settings.torch_dtype
    if settings.model is None:
        embedded = ByteLlama()
        weights = {name: tensor.to(dtype) for name, tensor in load_file(WEIGHTS).items()}
        embedded.load_state_dict(weights, assign=True)
        config = embedded.config
        return BaseModel(embedded, config.vocab_size, config.max_positions, "lm_head")
    transformers = import_transformers()
    model = from_pretrained(transformers.AutoModelForCausalLM, settings.model, dtype=dtype)
    model.config.use_cache = False  # keys and values of past tokens, of no use in training
    vocab_size = model.get_input_embeddings().num_embeddings
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    max_positions = getattr(model.config, "max_position_embeddings", None)
    return BaseModel(model, vocab_size, max_positions, names[0] if names else "lm_head")


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
