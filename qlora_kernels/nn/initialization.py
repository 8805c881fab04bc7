"""Adapters that start by absorbing what quantization lost: LoftQ, QPiSSA and QERA.

Each takes a dense weight W [N, K] and gives Q = q(W − …) with A [R, K] and B [N, R] such that
Q + scaling·B A is nearer to W than q(W) is. The factors of an SVD are U√(S/scaling) and
√(S/scaling)V, so that scaling cancels whatever alpha is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.nn.adapter import LoRAAdapter
from qlora_kernels.ops import dequantize, quantize

METHODS = ("loftq", "qpissa", "qera")
# Of the mean of the second moments' diagonal, added to it: inputs that were (nearly) always zero.
DAMPING = 1e-4


class AdapterStart(NamedTuple):
    """What an initialisation gives: the base to store, and the adapter's factors in fp32."""

    qw: QuantizedWeight
    lora_a: torch.Tensor
    lora_b: torch.Tensor


def loftq(
    weight: torch.Tensor, rank: int, scaling: float, format: Format, steps: int = 5
) -> AdapterStart:
    """LoftQ (Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization", 2023, algorithm 1).

    From BA = 0, `steps` times: Q = q(W − BA), BA = the best rank-R matrix for W − Q.

    Args:
        weight: [N, K].
        rank: R.
        scaling: the adapter's, above 0.
        format: of Q; it is quantized as it will be stored.
        steps: the paper's T, at least 1.
    """
    dense = weight.detach().float()
    product = torch.zeros_like(dense)
    for _ in range(_check_steps("loftq", steps)):
        qw = quantize((dense - product).to(weight.dtype), format)
        u, s, v = _svd(dense - dequantize(qw, torch.float32), rank)
        product = (u * s) @ v
    return AdapterStart(qw, *_factors(u, s, v, scaling))


def qpissa(
    weight: torch.Tensor, rank: int, scaling: float, format: Format, steps: int = 1
) -> AdapterStart:
    """QPiSSA (Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation",
    2024): the adapter takes W's principal part and Q is what is left.

    BA = the best rank-R matrix for W, Q = q(W − BA); with more steps BA = that for W − Q, and Q
    again. The stored base is not W's: merging, or another adapter, needs this one's start.

    Arguments as `loftq`.
    """
    dense = weight.detach().float()
    rest = dense
    for _ in range(_check_steps("qpissa", steps)):
        u, s, v = _svd(rest, rank)
        qw = quantize((dense - (u * s) @ v).to(weight.dtype), format)
        rest = dense - dequantize(qw, torch.float32)
    return AdapterStart(qw, *_factors(u, s, v, scaling))


def qera(
    weight: torch.Tensor,
    rank: int,
    scaling: float,
    format: Format,
    moments: torch.Tensor,
) -> AdapterStart:
    """QERA (Zhang et al., "QERA: an Analytical Framework for Quantization Error Reconstruction",
    2024): Q = q(W), and of all rank-R matrices BA the one with the least E‖(W − Q − BA)x‖².

    Args:
        moments: second moments of the inputs: E[x xᵀ] [K, K] for the exact solution, or its
            diagonal [K] for the approximate one, which needs no more than a vector a layer.

    Other arguments as `loftq`. The base stays q(W), so adapters can share it.

    Raises:
        ArgumentError: moments of another size.
    """
    cols = weight.shape[1]
    if tuple(moments.shape) not in ((cols,), (cols, cols)):
        got = list(moments.shape)
        raise argument_error("qera", "moments", f"[{cols}] or [{cols}, {cols}]", got)
    qw = quantize(weight.detach(), format)
    lost = weight.detach().double() - dequantize(qw, torch.float32).double()
    held = moments.to(lost.device, torch.float64)
    if held.dim() == 1:
        root = (held + DAMPING * held.mean()).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        u, s, v = _svd(lost * root, rank)
        return AdapterStart(qw, *_factors(u, s, v / root, scaling))
    damped = held.clone()
    damped.diagonal().add_(DAMPING * held.diagonal().mean())
    values, vectors = torch.linalg.eigh(damped)
    roots = values.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    u, s, v = _svd(lost @ (vectors * roots) @ vectors.t(), rank)
    return AdapterStart(qw, *_factors(u, s, v @ (vectors / roots) @ vectors.t(), scaling))


def _check_steps(op: str, steps: object) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise argument_error(op, "steps", "a whole number of at least 1", steps)
    return steps


def _svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first singular triplets: [N, R], [R], [R, K]."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def _factors(
    u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if scaling <= 0:
        raise argument_error("initialize", "scaling", "above 0", scaling)
    root = (s / scaling).sqrt()
    return (root[:, None] * v).float().contiguous(), (u * root).float().contiguous()


def start(
    method: str,
    weight: torch.Tensor,
    rank: int,
    scaling: float,
    format: Format,
    steps: int,
    moments: torch.Tensor | None,
) -> AdapterStart:
    """`loftq`, `qpissa` or `qera` by name.

    Raises:
        ArgumentError: another name, or no moments for qera.
    """
    if method == "loftq":
        return loftq(weight, rank, scaling, format, steps)
    if method == "qpissa":
        return qpissa(weight, rank, scaling, format, steps)
    if method != "qera":
        raise argument_error("initialize_adapters", "method", f"one of {METHODS}", repr(method))
    if moments is None:
        raise argument_error("initialize_adapters", "moments", "those of every layer", "none")
    return qera(weight, rank, scaling, format, moments)


class InputMoments:
    """Running second moments of the inputs of some layers, one calibration pass long."""

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, name: str, x: torch.Tensor) -> None:
        """Count x [..., K] in."""
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        part = rows.t() @ rows if self.exact else rows.square().sum(dim=0)
        self.sums[name] = self.sums[name] + part if name in self.sums else part
        self.counts[name] = self.counts.get(name, 0) + rows.shape[0]

    def moments(self) -> dict[str, torch.Tensor]:
        """Layer name -> E[x xᵀ] [K, K], or its diagonal [K]; fp64."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


@contextmanager
def input_moments(layers: Mapping[str, nn.Module], exact: bool = False) -> Iterator[InputMoments]:
    """Measure the inputs of these layers in every forward until the end of the block."""
    found = InputMoments(exact)
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: found.add(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def set_start(layer: LoRAAdapter, begin: AdapterStart) -> None:
    """Put an initialisation into a QLoRALinear."""
    layer.set_quantized_weight(begin.qw)  # type: ignore[operator]
    layer.lora_a.copy_(begin.lora_a)
    layer.lora_b.copy_(begin.lora_b)
