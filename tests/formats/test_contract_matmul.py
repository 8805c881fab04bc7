"""What every registered format must do, whoever registered it: products, gradients, layers."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import qlora_kernels as qlk
from qlora_kernels.backends.registry import entries
from qlora_kernels.formats import StoredOperands
from qlora_kernels.testing.errors import assert_as_accurate
from tests.tolerances import assert_right, assert_slope

FORMATS = qlk.list_formats()
# One format of every way to be stored: as kernels take it; in 8-bit scales of another kind; densely
# packed; with shifts; with a table per weight; per row; in blocks below what kernels take.
KINDS = ("nf4", "mxfp4", "bof3s", "nf2_offset", "int4_asym", "kmeans", "any4", "nvfp4")
N, RANK, SCALING = 96, 8, 0.5
per_format = pytest.mark.parametrize("name", FORMATS)
per_kind = pytest.mark.parametrize("name", KINDS)


def problem(name: str, cols: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """A quantized weight [N, cols] with x, adapter, bias, and the dense weight in fp64."""
    generator = torch.Generator().manual_seed(cols)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    qw = qlk.quantize(normal(N, cols), name)
    return {
        "qw": qw,
        "dense": qlk.dequantize(qw, torch.float32).double(),
        "x": normal(tokens, cols).to(dtype),
        "a": normal(RANK, cols) / 4,
        "b": normal(N, RANK) / 4,
        "bias": normal(N),
        "grad": normal(tokens, N).to(dtype),
    }


def results(p: dict[str, Any], product: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """y and every gradient of `product(x, a, b, bias)`."""
    cast = {key: p[key] if dtype is None else p[key].to(dtype) for key in ("x", "a", "b", "bias")}
    leaves = {key: value.detach().clone().requires_grad_() for key, value in cast.items()}
    y = product(*leaves.values())
    y.backward(p["grad"].to(y.dtype))
    return {"y": y.detach(), **{f"grad_{key}": leaf.grad for key, leaf in leaves.items()}}


def dense_qlora(dense: torch.Tensor) -> Any:
    def product(x: Any, a: Any, b: Any, bias: Any) -> torch.Tensor:
        return F.linear(x, dense, bias) + F.linear(F.linear(x, a), b) * SCALING

    return product


@per_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cols", "tokens"), [(128, 1), (128, 33), (77, 5)])
def test_forward_and_backward_are_as_accurate_as_torch(
    name: str, dtype: torch.dtype, cols: int, tokens: int
) -> None:
    p = problem(name, cols, tokens, dtype)

    def fused(x: Any, a: Any, b: Any, bias: Any) -> torch.Tensor:
        return qlk.qlora_linear(x, p["qw"], a, b, SCALING, bias)

    got = results(p, fused)
    exact = results(p, dense_qlora(p["dense"]), torch.float64)
    torchs = results(p, dense_qlora(p["dense"].to(dtype)), dtype)
    sizes = {key: part.abs() for key, part in p.items() if key != "qw"}
    magnitudes = results(sizes, dense_qlora(sizes["dense"]), torch.float64)
    # The two sums that a term may go through, of which no pair is longer.
    terms = N + cols + RANK + tokens + 4
    for key, value in got.items():
        if key in ("grad_a", "grad_b", "grad_bias"):
            assert value.dtype == torch.float32
            value = value.to(dtype)
        parts = (value, exact[key], torchs[key], magnitudes[key])
        assert_right(*parts, terms, roundings=6, factors=tokens * RANK)


@per_format
def test_quantized_linear_is_the_product_without_an_adapter(name: str) -> None:
    for cols in (128, 77):
        p = problem(name, cols, 9, torch.float32)
        x = p["x"].requires_grad_()
        y = qlk.quantized_linear(x, p["qw"], p["bias"])
        y.backward(p["grad"])
        dense = p["dense"]
        assert_as_accurate(
            y.detach(),
            F.linear(x.double(), dense, p["bias"].double()).detach(),
            F.linear(x, dense.float(), p["bias"]).detach(),
        )
        assert x.grad is not None
        assert_as_accurate(x.grad, p["grad"].double() @ dense, p["grad"] @ dense.float())
        assert qlk.quantized_linear(torch.randn(2, 3, cols), p["qw"]).shape == (2, 3, N)
        assert qlk.quantized_linear(torch.empty(0, cols), p["qw"]).shape == (0, N)


@per_kind
def test_every_cpu_level_multiplies(name: str) -> None:
    """The levels differ in the order of sums alone. Small blocks go through a GEMM, whose rows
    depend on each other: batch invariance is left to the reference, with the reason."""
    p = problem(name, 256, 5, torch.float32)
    wanted = F.linear(p["x"].double(), p["dense"])
    torchs = F.linear(p["x"], p["dense"].float())
    for entry in entries("quantized_matmul"):
        if not entry.backend.startswith("cpu:") or entry.available() is not None:
            continue
        with qlk.backend(entry.backend):
            assert_as_accurate(qlk.quantized_linear(p["x"], p["qw"]), wanted, torchs)
            if name == "nvfp4":
                with pytest.raises(qlk.errors.BackendError, match="block_size must be at least 32"):
                    qlk.quantized_linear(p["x"], p["qw"], batch_invariant=True)


@per_kind
@pytest.mark.parametrize("cols", [128, 77])
def test_rows_do_not_depend_on_the_batch(name: str, cols: int) -> None:
    p = problem(name, cols, 50, torch.float32)
    whole = qlk.quantized_linear(p["x"], p["qw"], p["bias"], batch_invariant=True)
    one = qlk.quantized_linear(p["x"][7:8], p["qw"], p["bias"], batch_invariant=True)
    assert torch.equal(whole[7:8], one)
    adapted = [
        qlk.qlora_linear(x, p["qw"], p["a"], p["b"], SCALING, batch_invariant=True)
        for x in (p["x"], p["x"][7:8])
    ]
    assert torch.equal(adapted[0][7:8], adapted[1])


@per_kind
def test_dropout_is_replayed_in_backward(name: str) -> None:
    """With the adapter's output alone as a function of x, its gradient shows the mask."""
    p = problem(name, 77, 6, torch.float32)
    x = p["x"].requires_grad_()
    torch.manual_seed(3)
    y = qlk.qlora_linear(x, p["qw"], p["a"], p["b"], SCALING, None, 0.5, training=True)
    y.backward(p["grad"])
    adapter = (p["a"], p["b"])
    assert_slope(y, x.grad, x, p["grad"], p["dense"], adapter, SCALING, 0.5)
    kept = (x.grad - p["grad"] @ p["dense"].float()).abs() > 1e-3
    assert 0.3 < kept.float().mean() < 0.7


@per_kind
def test_compiles_into_one_graph(name: str) -> None:
    layer = qlk.QLoRALinear.from_linear(torch.nn.Linear(128, N), rank=4, format=name)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 128, requires_grad=True)
    y = compiled(x)
    y.square().sum().backward()
    grads = [x.grad, layer.lora_b.grad]
    x.grad = layer.lora_b.grad = None
    wanted = layer(x)
    wanted.square().sum().backward()
    assert torch.equal(y, wanted)
    for got, want in zip(grads, (x.grad, layer.lora_b.grad), strict=True):
        assert torch.equal(got, want)


@per_kind
def test_gradients_in_fp64_are_those_of_finite_differences(name: str) -> None:
    p = problem(name, 64, 2, torch.float64)
    qw = p["qw"]
    x = p["x"].requires_grad_()
    a, b = p["a"][:1].double().requires_grad_(), p["b"][:, :1].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: qlk.qlora_linear(x, qw, a, b, SCALING)[:, :4], (x, a, b)
    )


@per_format
def test_layers_keep_the_bytes(name: str) -> None:
    """State dicts, casts, copies: what is stored is what was stored, at its true size."""
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 96))
    qlk.replace_linear(model, rank=4, format=name)
    qw = model[0].quantized_weight
    held = sum(
        p.numel() * p.element_size()
        for key, p in model[0].named_parameters()
        if key.startswith("weight") and key != "weight_codebook"
    )
    assert held == qw.nbytes
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 96))
    qlk.replace_linear(other, rank=4, format=name)
    x = torch.randn(5, 96)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), model(x))
    half = other.to(torch.bfloat16)[0].quantized_weight
    for field, tensor in qw.tensors().items():
        assert torch.equal(half.tensors()[field], tensor), field
    layer = qlk.QuantizedLinear.from_quantized(qw)
    assert torch.equal(layer.dequantize(), qlk.dequantize(qw))
    layer.set_quantized_weight(other[0].quantized_weight)


@per_format
def test_embeddings_look_up_the_rows(name: str) -> None:
    table = torch.nn.Embedding(40, 96)
    layer = qlk.QuantizedEmbedding.from_embedding(table, format=name)
    ids = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(layer(ids), layer.dequantize()[ids])


@per_kind
def test_explain_says_what_runs(name: str) -> None:
    qw = qlk.quantize(torch.randn(8, 128), name)
    for op in ("dequantize", "quantized_matmul", "qlora_linear_backward"):
        said = qlk.explain(op, qw)
        looked_up = name == "any4"
        assert ("looked up" in said) == looked_up
        assert ("chosen" in said) != looked_up
        assert ("codes unpacked" in said) == (name in ("bof3s", "nf2_offset"))
    if name == "int4_asym":
        assert "shifts times sums" in qlk.explain("quantized_matmul", qw)
        straddling = qlk.quantize(torch.randn(8, 77), name)
        assert "torch's GEMM" in qlk.explain("quantized_matmul", straddling)


@per_kind
def test_a_backward_saves_what_is_stored_and_no_more(name: str) -> None:
    qw = qlk.quantize(torch.randn(64, 128), name)
    saved = []
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qlk.quantized_linear(x, qw)
    stored = {t.data_ptr() for t in qw.tensors().values()}
    constant = 16 * 4 + 256 * 4 + 64  # tables that all weights share, and single numbers
    extra = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in stored)
    assert extra <= constant
    kept = isinstance(qw.operands(), StoredOperands)
    assert kept == (name in ("bof3s", "nf2_offset", "int4_asym", "kmeans", "any4"))


@pytest.mark.parametrize("name", ["bof3s", "int4_asym", "any4"])
def test_opcheck(name: str) -> None:
    p = problem(name, 128, 3, torch.float32)
    operands = p["qw"].operands()
    assert isinstance(operands, StoredOperands)
    ops, x, grad = torch.ops.qlora_kernels, p["x"], p["grad"]
    adapter = (p["a"], p["b"], SCALING)
    _, xa = ops.stored_qlora_linear(x, *operands, *adapter)
    calls = {
        ops.stored_dequantize: (*operands, torch.bfloat16),
        ops.stored_matmul: (x, *operands, p["bias"], False),
        ops.stored_matmul_backward_input: (grad, *operands),
        ops.stored_qlora_linear: (x, *operands, *adapter, p["bias"]),
        ops.stored_qlora_linear_backward: (
            *(grad, x, xa, *operands, *adapter, 0.0, None),
            [True, False, True],
        ),
    }
    for op, arguments in calls.items():
        opcheck(op.default, arguments)
