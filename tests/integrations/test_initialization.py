"""LoftQ, QPiSSA, QERA: each against the definition of what it minimises, for every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.nn.initialization import loftq, qera, qpissa
from tests.integrations.models import make, relative_error, saved, tokens, transformers

N, K, RANK, SCALING = 48, 96, 6, 0.5


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Some spectrum, so that a low rank matters."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(N, N, generator=generator) * torch.linspace(2, 0.1, N)
    return (left @ torch.randn(N, K, generator=generator) / 10).to(dtype)


def correlated_inputs(count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(K, K, generator=generator) * torch.logspace(0, -2, K)
    return torch.randn(count, K, generator=generator) @ mix.t()


def total(begin: Any, scaling: float = SCALING) -> torch.Tensor:
    return qlk.dequantize(begin.qw, torch.float32) + scaling * begin.lora_b @ begin.lora_a


def best_rank(matrix: torch.Tensor, rank: int) -> float:
    """The least Frobenius distance of a rank-R matrix: what the other singular values make."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("format", qlk.list_formats())
def test_loftq_is_the_alternation_of_its_paper(format: str) -> None:
    w, fmt = weight(), qlk.get_format(format)
    plain = qlk.quantize(w, fmt)
    lost = float((w - qlk.dequantize(plain)).norm())
    errors = [float((w - total(loftq(w, RANK, SCALING, fmt, steps))).norm()) for steps in (1, 5)]
    assert errors[0] == pytest.approx(best_rank(w - qlk.dequantize(plain), RANK), rel=1e-4)
    assert errors[1] < errors[0] < lost
    begin = loftq(w, RANK, SCALING, fmt, 3)
    # It ends on the SVD: the adapter is the best one for the base that is stored.
    rest = w - qlk.dequantize(begin.qw)
    assert float((w - total(begin)).norm()) == pytest.approx(best_rank(rest, RANK), rel=1e-4)


@pytest.mark.parametrize("format", qlk.list_formats())
def test_qpissa_takes_the_principal_part(format: str) -> None:
    w, fmt = weight(), qlk.get_format(format)
    begin = qpissa(w, RANK, SCALING, fmt)
    principal = SCALING * begin.lora_b @ begin.lora_a
    assert float((w - principal).norm()) == pytest.approx(best_rank(w, RANK), rel=1e-4)
    # It ends on the quantization of what is left.
    assert torch.equal(begin.qw.codes, qlk.quantize(w - principal, fmt).codes)
    plain = float((w - qlk.dequantize(qlk.quantize(w, fmt))).norm())
    errors = [float((w - total(qpissa(w, RANK, SCALING, fmt, steps))).norm()) for steps in (1, 5)]
    assert errors[1] < errors[0] < plain


@pytest.mark.parametrize("format", qlk.list_formats())
def test_qera_minimises_the_error_of_the_output(format: str) -> None:
    w, fmt, x = weight(), qlk.get_format(format), correlated_inputs()
    exact = (x.double().T @ x.double()) / len(x)
    begins = {
        "exact": qera(w, RANK, SCALING, fmt, exact),
        "diagonal": qera(w, RANK, SCALING, fmt, exact.diagonal()),
        "weight": loftq(w, RANK, SCALING, fmt, 1),
    }
    plain = qlk.quantize(w, fmt)
    for name in ("exact", "diagonal"):
        assert torch.equal(begins[name].qw.codes, plain.codes)
    lost = {
        name: float((x @ (w - total(begin)).T).square().mean()) for name, begin in begins.items()
    }
    assert lost["exact"] < min(lost["diagonal"], lost["weight"])
    # The diagonal alone minimises the error of inputs that are not correlated.
    plainly = exact.diagonal().sqrt()
    alone = {
        name: float(((w - total(begin)).double() * plainly).norm())
        for name, begin in begins.items()
    }
    assert alone["diagonal"] < min(alone["exact"], alone["weight"])
    # The least that rank R can reach, by the singular values of (W − Q) E[xxᵀ]^½.
    values, vectors = torch.linalg.eigh(exact)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    least = best_rank((w - qlk.dequantize(plain)).double() @ root, RANK) ** 2 / N
    assert least <= lost["exact"] * (1 + 1e-4)
    assert lost["exact"] <= 1.05 * least  # damping costs a little


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    w = weight()
    moments = torch.ones(K)
    moments[::3] = 0.0
    for given in (moments, torch.diag(moments)):
        begin = qera(w, RANK, SCALING, qlk.get_format("nf4"), given)
        assert bool(begin.lora_a.isfinite().all()) and bool(begin.lora_b.isfinite().all())


@pytest.mark.parametrize("method", ["loftq", "qpissa", "qera"])
@pytest.mark.parametrize("alpha", [6.0, 32.0])
def test_scaling_cancels(method: str, alpha: float) -> None:
    """PEFT's LoftQ is right for alpha = r alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K))
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qlk.replace_linear(model, rank=RANK, alpha=alpha)
    x = torch.randn(64, K)
    moments = None
    if method == "qera":
        with qlk.calibrate(model) as found:
            model(x)
        moments = found.moments()
        assert {name: m.shape for name, m in moments.items()} == {"0": (K,), "2": (N,)}
        assert relative_error(moments["0"], x.square().mean(dim=0)) < 1e-6
    report = qlk.initialize_adapters(model, dense, method, moments=moments)
    assert report.keys() == {"0", "2"}
    for name, (before, after) in report.items():
        layer = model.get_submodule(name)
        assert after < before
        got = layer.dequantize(torch.float32) + layer.delta_weight()
        assert relative_error(got, dense[f"{name}.weight"]) == pytest.approx(after, rel=1e-4)


def test_peft_models(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="in the hf extra")
    dense = make("llama")
    path = saved(dense, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=qlk.QLoRAKernelsConfig(), dtype=torch.float32
    )
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True)
    )
    ids = tokens()
    wanted = dense(ids).logits
    plain = relative_error(wrapped(input_ids=ids).logits, wanted)
    with qlk.calibrate(wrapped, exact=True) as found:
        wrapped(input_ids=ids)
    report = qlk.initialize_adapters(wrapped, dense.state_dict(), "qera", moments=found.moments())
    assert len(report) == 14 and all(after < before for before, after in report.values())
    assert relative_error(wrapped(input_ids=ids).logits, wanted) < 0.7 * plain
    loaded = []
    state = dense.state_dict()

    def load(name: str) -> torch.Tensor:
        loaded.append(name)
        return state[name]

    qlk.initialize_adapters(wrapped, load, "loftq", steps=5)
    assert len(loaded) == 14
    assert relative_error(wrapped(input_ids=ids).logits, wanted) < plain


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    dense = dict(model.state_dict())
    with pytest.raises(qlk.errors.ArgumentError, match="adapters over 4-bit layers"):
        qlk.initialize_adapters(model, dense)
    with pytest.raises(qlk.errors.ArgumentError, match="calibrate"), qlk.calibrate(model):
        pass
    qlk.replace_linear(model, rank=RANK)
    with pytest.raises(qlk.errors.ArgumentError, match="one of"):
        qlk.initialize_adapters(model, dense, "svd")
    with pytest.raises(qlk.errors.ArgumentError, match="moments"):
        qlk.initialize_adapters(model, dense, "qera")
    with pytest.raises(qlk.errors.ArgumentError, match=r"dense\[0.weight\] must be \[48, 96\]"):
        qlk.initialize_adapters(model, {})
    with pytest.raises(qlk.errors.ArgumentError, match="steps"):
        qlk.initialize_adapters(model, dense, "loftq", steps=0)
    with pytest.raises(qlk.errors.ArgumentError, match="moments must be"):
        qera(weight(), RANK, SCALING, qlk.get_format("nf4"), torch.ones(3))
