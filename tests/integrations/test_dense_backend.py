"""backend("dense"): to the bit what stock bitsandbytes and PEFT compute, forward and backward."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from tests.integrations.models import (
    in_4bit,
    loss_and_gradients,
    make,
    relative_error,
    saved,
    tokens,
    transformers,
    worst_error,
)

bnb = pytest.importorskip("bitsandbytes", reason="in the bnb extra")
peft = pytest.importorskip("peft", reason="in the hf extra")
Auto = transformers.AutoModelForCausalLM

KINDS = list(itertools.product(("nf4", "fp4"), (False, True), (torch.uint8, torch.bfloat16)))
N, K = 96, 192


def step(model: nn.Module, x: torch.Tensor, grad_y: torch.Tensor) -> list[torch.Tensor]:
    """y, and every gradient."""
    model.zero_grad()
    given = x.detach().requires_grad_()
    y = model(given)
    y.backward(grad_y)
    assert given.grad is not None
    trained = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), given.grad, *trained]


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_equal_stock_to_the_bit(dtype: torch.dtype, adapted: bool) -> None:
    torch.manual_seed(0)
    for quant_type, nested, storage in KINDS:
        options = {"quant_type": quant_type, "compress_statistics": nested}
        layer = bnb.nn.Linear4bit(K, N, quant_storage=storage, compute_dtype=dtype, **options)
        model: Any = nn.Sequential(layer.to(dtype).to("cpu"))
        model.is_loaded_in_4bit = True
        if adapted:
            config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
            model = peft.get_peft_model(model, config)
        for m in (1, 3, 64):
            x, grad_y = torch.randn(m, K, dtype=dtype), torch.randn(m, N, dtype=dtype)
            wanted = step(model.train(), x, grad_y)
            assert len(wanted) == (4 if adapted else 3)
            assert len(qlk.accelerate(model, verbose=False).fused) == 1
            with qlk.backend("dense"):
                got = step(model, x, grad_y)
            qlk.deaccelerate(model)
            for ours, theirs in zip(got, wanted, strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_checkpoints_equal_stock_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """from_pretrained of a bitsandbytes checkpoint, into its layers and into ours."""
    dense = saved(make("llama", num_hidden_layers=1), tmp_path)
    few, many = tokens(1, 2), tokens(2, 60)
    for number, (quant_type, nested, storage) in enumerate(KINDS):
        stock = in_4bit(
            dense,
            dtype=dtype,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_quant_storage=storage,
        )
        path = str(tmp_path / f"stock{number}")
        stock.save_pretrained(path)
        ours = Auto.from_pretrained(path, config=qlk.QLoRAKernelsConfig.adopt(path))
        wanted = [stock(ids).logits for ids in (few, many)]
        with qlk.backend("dense"):
            got = [ours(ids).logits for ids in (few, many)]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        # The kernels add in an order of their own; for many fp32 tokens, in torch's.
        assert relative_error(ours(few).logits, wanted[0]) < {4: 1e-6, 2: 2e-2}[dtype.itemsize]
        if dtype == torch.float32:
            assert torch.equal(ours(many).logits, wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_equals_stock(dtype: torch.dtype, tmp_path: Path) -> None:
    """The loss to the bit. Gradients of layers that share x are added up in autograd's order, which
    is another one where base and adapter are one node."""
    dense = saved(make("llama"), tmp_path)
    model = in_4bit(dense, dtype=dtype, bnb_4bit_compute_dtype=dtype)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    wanted, gradients = loss_and_gradients(model, tokens())
    qlk.accelerate(model, verbose=False)
    with qlk.backend("dense"):
        got, ours = loss_and_gradients(model, tokens())
    assert torch.equal(got, wanted) and len(gradients) == 28
    assert worst_error(ours, gradients) < {4: 2e-6, 2: 2e-2}[dtype.itemsize]
    # The kernels add one token's products in an order of their own: it is what was forced that
    # equals stock. (For many tokens they may leave the sums to torch.)
    one = tokens(1, 1)
    with qlk.backend("dense"):
        dense_logits = model(one).logits
    with qlk.backend("cpu:portable"):
        assert not torch.equal(model(one).logits, dense_logits)


def test_what_else_runs_while_it_is_forced() -> None:
    """Products only: the codecs, whose bits are the same everywhere, are chosen by priority."""
    weight = torch.randn(64, 128)
    wanted = qlk.quantize(weight)
    x = torch.randn(2, 128)
    with qlk.backend("dense"):
        qw = qlk.quantize(weight)
        assert torch.equal(qw.codes, wanted.codes)
        dense = qlk.dequantize(qw)
        y = qlk.quantized_linear(x, qw)
        text = qlk.explain("dequantize", qw)
        with pytest.raises(qlk.errors.BackendError, match="may depend on the others"):
            qlk.quantized_linear(x, qw, batch_invariant=True)
    assert torch.equal(y, torch.nn.functional.linear(x, dense))
    assert "backend auto" in text
