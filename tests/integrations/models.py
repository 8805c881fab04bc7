"""Small models with random weights, built from configurations; no network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="in the hf extra")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of family `name` in eval mode: llama, mistral, qwen2, mixtral, qwen2_moe, gpt_oss,
    llama4, gpt2, t5, bert, roberta or distilbert."""
    torch.manual_seed(seed)
    sizes = {**_SIZES, **changes}
    if name == "llama":
        config = transformers.LlamaConfig(**sizes)
        return transformers.LlamaForCausalLM(config).eval()
    if name == "mistral":
        config = transformers.MistralConfig(**sizes)
        return transformers.MistralForCausalLM(config).eval()
    if name == "qwen2":
        config = transformers.Qwen2Config(**sizes)
        return transformers.Qwen2ForCausalLM(config).eval()
    if name == "mixtral":
        config = transformers.MixtralConfig(
            **sizes, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.0
        )
        return transformers.MixtralForCausalLM(config).eval()
    if name == "qwen2_moe":
        config = transformers.Qwen2MoeConfig(
            **sizes,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=64,
            num_experts=4,
            num_experts_per_tok=2,
        )
        return transformers.Qwen2MoeForCausalLM(config).eval()
    if name in ("gpt_oss", "llama4"):
        sizes |= {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
        if name == "gpt_oss":
            experts = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).eval()
        else:
            config = transformers.Llama4TextConfig(
                **sizes, intermediate_size_mlp=128, interleave_moe_layer_step=1
            )
            experts = transformers.Llama4ForCausalLM(config).eval()
        for parameter_name, parameter in experts.named_parameters():
            if ".experts." in parameter_name:  # biases and some weights begin as zeros
                torch.nn.init.normal_(parameter, std=0.1)
        return experts
    if name == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=64,
            hidden_dim=128,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
        )
        return transformers.DistilBertModel(config).eval()
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, **changes
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_ff=128,
            d_kv=16,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            **changes,
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    del sizes["num_key_value_heads"]
    if name == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**sizes)).eval()
    assert name == "bert", name
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def saved(model: nn.Module, folder: Path) -> str:
    """The model's checkpoint under `folder`."""
    path = str(folder / "dense")
    model.save_pretrained(path)  # type: ignore[operator]
    return path


def in_4bit(path: str, dtype: torch.dtype | str = "auto", **changes: Any) -> nn.Module:
    """The checkpoint loaded by transformers with stock bitsandbytes layers, which are in training
    mode: else they compute in bf16 on a CPU that has products of it, and repack their weights."""
    pytest.importorskip("bitsandbytes", reason="in the bnb extra")
    options: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
        **changes,
    }
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=dtype
    )
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    return model


def loss_and_gradients(
    model: nn.Module, ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of a language-modelling step, and the gradients of everything trained."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    named = model.named_parameters()
    return out.logits.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖ in fp64."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-300))


def worst_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a gradient; both must be of the same parameters."""
    assert got.keys() == wanted.keys()
    assert wanted
    # Not the built-in max, which passes over NaN.
    return float(torch.tensor([relative_error(got[name], wanted[name]) for name in wanted]).max())
