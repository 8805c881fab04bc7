"""The embedded base model: a byte-level, Llama-style language model in plain PyTorch.

RMSNorm, rotary positions, SwiGLU, every projection an ``nn.Linear`` under Llama's own module names,
so that `replace_linear` and PEFT's target names apply unchanged. Called by `finetune.load`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ByteLlamaConfig:
    """Sizes of a `ByteLlama`; the defaults are the embedded model's."""

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def rotary_tables(config: ByteLlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, each [max_positions, head_dim] in fp32."""
    head_dim = config.hidden_size // config.num_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(
        torch.arange(config.max_positions, dtype=torch.float32), config.rope_theta**-exponents
    )
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [..., positions, head_dim], halves paired as Llama pairs them."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention over rotary positions."""

    def __init__(self, config: ByteLlamaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, positions, size = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, positions, self.num_heads, -1).transpose(1, 2)

        query = rotate(heads(self.q_proj(x)), cos, sin)
        key = rotate(heads(self.k_proj(x)), cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, heads(self.v_proj(x)), is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, positions, size))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ByteLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ByteLlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class ByteLlama(nn.Module):
    """Byte-level decoder: ids [batch, positions] int64 to logits [batch, positions, vocab_size].

    Raises ValueError for more positions than ``config.max_positions``.
    """

    def __init__(self, config: ByteLlamaConfig | None = None) -> None:
        super().__init__()
        self.config = config or ByteLlamaConfig()
        self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(self.config) for _ in range(self.config.num_layers)
        )
        self.norm = nn.RMSNorm(self.config.hidden_size, eps=self.config.norm_eps)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        cos, sin = rotary_tables(self.config)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw every weight afresh: N(0, 0.02), projections into the residual stream scaled by
        1/sqrt(2 * num_layers) as in GPT-2, so that the stream's variance does not grow with depth.
        """
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = residual_std if into_residual else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = input_ids.shape[1]
        if positions > self.config.max_positions:
            raise ValueError(
                f"ByteLlama: input_ids must hold at most {self.config.max_positions} positions, "
                f"got {positions}"
            )
        x = self.embed_tokens(input_ids)
        cos = self.get_buffer("rotary_cos")[:positions].to(x.dtype)
        sin = self.get_buffer("rotary_sin")[:positions].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))
