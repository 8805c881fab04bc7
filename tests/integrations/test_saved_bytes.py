"""What a LoRA linear keeps for its backward beyond its input and its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qlora_kernels as qlk

peft = pytest.importorskip("peft", reason="in the hf extra")

TOKENS, K, N = 256, 512, 512


def saved_bytes(layer: nn.Module, x: torch.Tensor, model: nn.Module) -> int:
    """Bytes of the storages that autograd holds after a forward, without x's and parameters'."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known.add(x.untyped_storage().data_ptr())
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(found.values())


def wrapped(kind: str, dropout: float) -> Any:
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(K, N, bias=False).to(torch.bfloat16)
    if kind == "quantized":
        linear = qlk.QuantizedLinear.from_linear(linear)  # type: ignore[arg-type]
    elif kind == "bitsandbytes":
        bnb = pytest.importorskip("bitsandbytes", reason="in the bnb extra")
        stored = bnb.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
        stored.load_state_dict(linear.state_dict())
        linear = stored.to("cpu")
    model = nn.Sequential(linear)
    if kind == "bitsandbytes":
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    options = {"r": 8, "target_modules": ["0"], "lora_dropout": dropout}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["quantized", "bitsandbytes", "dense"])
def test_at_most_a_twentieth_of_the_input(kind: str, dropout: float) -> None:
    model = wrapped(kind, dropout).train()
    x = torch.randn(TOKENS, K, dtype=torch.bfloat16, requires_grad=True)
    layer = model.base_model.model[0]
    report = qlk.accelerate(model, verbose=False)
    assert len(report.fused) == 1
    assert saved_bytes(layer, x, model) <= 0.05 * x.nbytes
    qlk.deaccelerate(model)
    # Stock PEFT: x again in fp32 for the adapter, and with dropout the masked x and its mask.
    assert saved_bytes(layer, x, model) >= (1.0 if dropout == 0.0 else 2.0) * x.nbytes
