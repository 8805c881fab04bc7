"""What the grid is compared with. Each function makes a call, or says why there is none here."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from qlora_kernels.formats import Format
from qlora_kernels.testing.timing import Call, Rotation

if TYPE_CHECKING:
    from bench.grid.case import Case

ALPHA = 32
BNB_FORMATS = ("nf4", "fp4")
# torchao's to_nf4 takes scales in groups of 256 blocks of 64.
TORCHAO_MULTIPLE = 64 * 256


class PeerMissing(Exception):
    """There is no such peer here; the message says why."""


def load(module: str) -> ModuleType:
    """Import a peer's module.

    Raises:
        PeerMissing: it is not installed, or does not load on this machine.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PeerMissing(f"{error.name} is not installed") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise PeerMissing(f"{module} does not load: {error}") from error


def _failures() -> tuple[type[BaseException], ...]:
    usual = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, ImportError)
    try:
        # Triton's own errors (a kernel that does not compile, too much shared memory) are neither.
        return (*usual, ArithmeticError, load("triton.errors").TritonError)
    except PeerMissing:
        return (*usual, ArithmeticError)


# What a competitor may raise that costs its own row and no other.
FAILURES = _failures()


def first_line(error: BaseException) -> str:
    """An error in a line, for a record."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _bnb(fmt: Format) -> Any:
    if fmt.name not in BNB_FORMATS:
        raise PeerMissing(f"bitsandbytes has no {fmt.name}")
    return load("bitsandbytes.functional")


def _bnb_options(fmt: Format) -> dict[str, Any]:
    return {
        "blocksize": fmt.block_size,
        "quant_type": fmt.name,
        "compress_statistics": fmt.double_quant,
    }


def bnb_quantize(fmt: Format, weights: Rotation[torch.Tensor]) -> Call:
    """bitsandbytes.functional.quantize_4bit."""
    bnb = _bnb(fmt)
    return lambda i: bnb.quantize_4bit(weights[i], **_bnb_options(fmt))


def bnb_double_quantize(scales: Rotation[torch.Tensor]) -> Call:
    """What bitsandbytes does with its absmax: mean, difference, blockwise quantization."""
    bnb = load("bitsandbytes.functional")

    def call(i: int) -> object:
        absmax = scales[i]
        return bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)

    return call


def _bnb_weights(fmt: Format, dense: torch.Tensor, case: Case) -> Rotation[Any]:
    quantized = _bnb(fmt).quantize_4bit(dense, **_bnb_options(fmt))
    return case.rotate(quantized, dense.numel() // 2)


def bnb_dequantize(fmt: Format, dense: torch.Tensor, case: Case) -> Call:
    """bitsandbytes.functional.dequantize_4bit."""
    bnb, weights = _bnb(fmt), _bnb_weights(fmt, dense, case)
    return lambda i: bnb.dequantize_4bit(*weights[i])


def bnb_two_steps(fmt: Format, dense: torch.Tensor, case: Case, x: torch.Tensor) -> Call:
    """dequantize_4bit, then torch's linear."""
    bnb, weights = _bnb(fmt), _bnb_weights(fmt, dense, case)
    return lambda i: F.linear(x, bnb.dequantize_4bit(*weights[i]))


def bnb_backward_input(fmt: Format, dense: torch.Tensor, case: Case, grad_y: torch.Tensor) -> Call:
    """dequantize_4bit, then torch's matmul: bitsandbytes' backward."""
    bnb, weights = _bnb(fmt), _bnb_weights(fmt, dense, case)
    return lambda i: grad_y @ bnb.dequantize_4bit(*weights[i])


def bnb_layer(fmt: Format, dense: torch.Tensor) -> nn.Module:
    """A bitsandbytes Linear4bit of a dense weight [N, K]."""
    _bnb(fmt)
    modules = load("bitsandbytes").nn
    rows, cols = dense.shape
    layer: nn.Module = modules.Linear4bit(
        cols,
        rows,
        bias=False,
        compute_dtype=dense.dtype,
        compress_statistics=fmt.double_quant,
        quant_type=fmt.name,
        device="meta",
    )
    layer.weight = modules.Params4bit(
        dense.clone(),
        requires_grad=False,
        blocksize=fmt.block_size,
        compress_statistics=fmt.double_quant,
        quant_type=fmt.name,
    )
    return layer.to(dense.device)


def bnb_linear(
    fmt: Format, dense: torch.Tensor, case: Case, x: torch.Tensor, training: bool
) -> Call:
    """bitsandbytes Linear4bit in train or eval mode."""
    layers = case.rotate(bnb_layer(fmt, dense).train(training), dense.numel() // 2)
    return lambda i: layers[i](x)


def torchao_nf4(fmt: Format, dense: torch.Tensor) -> Any:
    """torchao's NF4Tensor of a dense weight; its table has four digits, so it is another format."""
    if fmt.name != "nf4":
        raise PeerMissing(f"torchao has no {fmt.name}")
    if dense.numel() % TORCHAO_MULTIPLE:
        raise PeerMissing(f"torchao takes multiples of {TORCHAO_MULTIPLE} weights")
    return load("torchao.quantization").to_nf4(dense, fmt.block_size, 256)


def torchao_quantize(fmt: Format, weights: Rotation[torch.Tensor]) -> Call:
    """torchao's to_nf4."""
    torchao_nf4(fmt, weights[0])
    to_nf4 = load("torchao.quantization").to_nf4
    return lambda i: to_nf4(weights[i], fmt.block_size, 256)


def _torchao_weights(fmt: Format, dense: torch.Tensor, case: Case) -> Rotation[Any]:
    weight = torchao_nf4(fmt, dense)
    # Not clone: torchao's decodes to other values.
    return Rotation(lambda _: copy.deepcopy(weight), dense.numel() // 2, case.rotated_bytes)


def torchao_dequantize(fmt: Format, dense: torch.Tensor, case: Case) -> Call:
    """torchao's NF4Tensor.get_original_weight."""
    weights = _torchao_weights(fmt, dense, case)
    return lambda i: weights[i].get_original_weight()


def torchao_linear(fmt: Format, dense: torch.Tensor, case: Case, x: torch.Tensor) -> Call:
    """torchao's linear_nf4."""
    weights = _torchao_weights(fmt, dense, case)
    workflow = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
    linear_nf4 = load(workflow).linear_nf4
    return lambda i: linear_nf4(x, weights[i])


def compiled(function: Callable[..., object], arguments: Callable[[int], tuple[Any, ...]]) -> Call:
    """A function through torch.compile, given the arguments of a call's number; it is run once, so
    that it is compiled."""
    # Or an earlier point's code would count towards the limit above which it stops compiling.
    torch.compiler.reset()
    fast = torch.compile(function, dynamic=False)
    try:
        fast(*arguments(0))
    except RuntimeError as error:  # no C++ compiler, no Triton, an operator it cannot lower
        reason = str(error).strip().splitlines()
        raise PeerMissing(f"torch.compile: {reason[0] if reason else error!r}") from error
    return lambda i: fast(*arguments(i))


class UnfusedLoRA(nn.Module):
    """PEFT's formula in plain torch, for machines without PEFT:
    base(x) + lora_B(lora_A(dropout(x.to(fp32))))·scaling, cast to base's dtype."""

    def __init__(
        self, base: nn.Module, rows: int, cols: int, rank: int, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        device = next(base.parameters()).device
        self.base_layer = base
        self.lora_A = nn.Linear(cols, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, rows, bias=False, device=device)
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        low = self.lora_dropout(x.to(self.lora_A.weight.dtype))
        return (result + self.lora_B(self.lora_A(low)) * self.scaling).to(result.dtype)


def dense_linear(dense: torch.Tensor) -> nn.Linear:
    """An nn.Linear around a weight, frozen."""
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(dense, requires_grad=False)
    return linear


def peft_layer(base: nn.Module, rank: int, dropout: float = 0.0, alpha: float = ALPHA) -> nn.Module:
    """PEFT's LoRA layer over a linear layer."""
    peft = load("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"])
    model = nn.Sequential(base)
    if type(base).__name__ == "Linear4bit":
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    layer: nn.Module = peft.get_peft_model(model, config)
    return layer
