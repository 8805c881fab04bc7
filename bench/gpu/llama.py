"""A Llama of any size in plain torch, with linear layers of any kind: nothing but torch is needed.

It computes, and keeps for its backward, what transformers' does (norms and rotary tables through
fp32, logits in fp32 for the loss), so that the planner's figures are about it too. Weights are
random, made on the device and quantized one by one: the dense model is never whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_kernels.integrations.plan import SHAPES

# (out_features, in_features) -> a layer on the device.
LinearFactory = Callable[[int, int], nn.Module]
NORM_EPS = 1e-6
ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Sizes:
    """Of a model; the order is that of `plan.SHAPES`."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    @classmethod
    def named(cls, model: str) -> Sizes:
        """Of a released model, e.g. "llama-65b"."""
        return cls(*SHAPES[model])

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.hidden // self.heads


TINY = Sizes(96, 128, 256, 2, 4, 2)


@dataclass
class Cache:
    """Keys and values of a layer, [batch, kv_heads, positions, head_size], written in place."""

    keys: torch.Tensor
    values: torch.Tensor


class RMSNorm(nn.Module):
    """x / rms(x) · weight, through fp32."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * (wide * scale).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, heads, positions, head_size], halves paired as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention, keys and values shared by groups of heads."""

    def __init__(self, sizes: Sizes, linear: LinearFactory) -> None:
        super().__init__()
        self.sizes = sizes
        narrow = sizes.kv_heads * sizes.head_size
        self.q_proj = linear(sizes.hidden, sizes.hidden)
        self.k_proj = linear(narrow, sizes.hidden)
        self.v_proj = linear(narrow, sizes.hidden)
        self.o_proj = linear(sizes.hidden, sizes.hidden)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: Cache | None,
        position: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, length, _ = x.shape

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, length, -1, self.sizes.head_size).transpose(1, 2)

        query = rotate(heads(self.q_proj(x)), cos, sin)
        key, value = rotate(heads(self.k_proj(x)), cos, sin), heads(self.v_proj(x))
        shared = self.sizes.kv_heads < self.sizes.heads
        if cache is None:
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=shared
            )
        else:
            assert position is not None
            cache.keys.index_copy_(2, position, key)
            cache.values.index_copy_(2, position, value)
            seen = torch.arange(cache.keys.shape[2], device=x.device) <= position[:, None]
            mixed = F.scaled_dot_product_attention(
                query, cache.keys, cache.values, attn_mask=seen[None, None], enable_gqa=shared
            )
        out: torch.Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, sizes: Sizes, linear: LinearFactory) -> None:
        super().__init__()
        self.gate_proj = linear(sizes.intermediate, sizes.hidden)
        self.up_proj = linear(sizes.intermediate, sizes.hidden)
        self.down_proj = linear(sizes.hidden, sizes.intermediate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each added to the stream."""

    def __init__(
        self, sizes: Sizes, linear: LinearFactory, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden, device, dtype)
        self.self_attn = Attention(sizes, linear)
        self.post_attention_layernorm = RMSNorm(sizes.hidden, device, dtype)
        self.mlp = MLP(sizes, linear)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: Cache | None = None,
        position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, position)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """The model; everything but what `linear` makes is dense and frozen.

    Args:
        sizes: of the model.
        linear: makes the adapted projections.
        device, dtype: of the rest, and of activations.
        checkpointing: recompute each layer in backward.
        generator: of the embeddings and the output layer; on `device`.
    """

    def __init__(
        self,
        sizes: Sizes,
        linear: LinearFactory,
        device: torch.device,
        dtype: torch.dtype,
        checkpointing: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.sizes, self.checkpointing = sizes, checkpointing
        options = {"device": device, "dtype": dtype}
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.hidden, **options)
        self.layers = nn.ModuleList(
            Layer(sizes, linear, device, dtype) for _ in range(sizes.layers)
        )
        self.norm = RMSNorm(sizes.hidden, device, dtype)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, **options)
        for module in (self.embed_tokens, self.lm_head):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
            module.weight.requires_grad_(False)

    def rotary(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [positions, head_size]."""
        size = self.sizes.head_size
        exponents = torch.arange(0, size, 2, device=positions.device).float() / size
        angles = positions.float()[:, None] * ROPE_THETA**-exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        caches: list[Cache] | None = None,
        position: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        """Logits [batch, positions, vocabulary] and, with labels, the loss of the next tokens.

        With caches it is a step of decoding: input_ids [batch, n] stand at `position` [n].
        """
        x = self.embed_tokens(input_ids)
        if self.checkpointing and self.training:
            x.requires_grad_()
        where = torch.arange(input_ids.shape[1], device=x.device) if position is None else position
        cos, sin = self.rotary(where, x.dtype)
        for i, layer in enumerate(self.layers):
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin, caches[i] if caches else None, position)
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:
            wide = logits.float()
            shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
            loss = F.cross_entropy(wide.view(-1, wide.shape[-1]), shifted)
        return SimpleNamespace(logits=logits, loss=loss)

    def new_caches(self, batch: int, positions: int) -> list[Cache]:
        """Empty caches for decoding."""
        shape = (batch, self.sizes.kv_heads, positions, self.sizes.head_size)
        weight = self.embed_tokens.weight
        return [Cache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers]
