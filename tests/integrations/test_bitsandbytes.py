"""bitsandbytes' own ops and layers on these kernels, against the reference, not against stock."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.integrations.bitsandbytes import (
    HELD_OPERANDS,
    PatchReport,
    operands_of,
    quantized_weight_of,
)
from qlora_kernels.reference.blockwise import (
    dequantize_blockwise_reference,
    quantize_blockwise_reference,
)
from tests.tolerances import assert_linear

bnb = pytest.importorskip("bitsandbytes", reason="in the bnb extra")
F = bnb.functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def patched() -> Iterator[PatchReport]:
    yield qlk.patch_bitsandbytes()
    qlk.unpatch_bitsandbytes()


def weight(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols)).to(dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (7, 65), (1, 1)])
@pytest.mark.parametrize("nested", [False, True])
def test_codec_is_ours_to_the_bit(
    patched: PatchReport, quant_type: str, dtype: torch.dtype, shape: tuple[int, int], nested: bool
) -> None:
    w = weight(*shape, dtype)
    packed, state = F.quantize_4bit(w, quant_type=quant_type, compress_statistics=nested)
    qw = qlk.quantize(w, quant_type, 64, double_quant=False)
    assert torch.equal(packed.view(-1), qw.codes)
    got = F.dequantize_4bit(packed, state)
    if not nested:
        assert torch.equal(state.absmax, qw.absmax)
        assert torch.equal(got, qlk.dequantize(qw))
    # Whatever bitsandbytes made of the scales, its state decodes to what this library decodes.
    assert torch.equal(got, qlk.dequantize(quantized_weight_of(packed, state)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("cols", [96, 128, 200])
def test_matmul_is_right_where_blocks_straddle_rows(
    patched: PatchReport, cols: int, nested: bool
) -> None:
    w = weight(32, cols)
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    dense = qlk.dequantize(quantized_weight_of(packed, state)).double()
    x = torch.randn(3, 5, cols, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias = torch.linspace(-1, 1, 32)
    y = bnb.matmul_4bit(x, packed, state, bias=bias)
    assert_linear(y.detach(), x.detach(), dense, bias)
    y.backward(torch.ones_like(y))
    assert_linear(x.grad, torch.ones(3, 5, 32), dense.T)
    with torch.no_grad():
        assert torch.equal(bnb.matmul_4bit(x, packed, state, bias=bias), y.detach())


def test_gemv_and_out_overloads(patched: PatchReport) -> None:
    w = weight(32, 96)
    packed, state = F.quantize_4bit(w, quant_type="fp4", compress_statistics=True)
    dense = F.dequantize_4bit(packed, state)
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(2))
    y = F.gemv_4bit(x, packed, state=state)
    assert_linear(y, x, dense.double())
    out = torch.empty_like(y)
    assert torch.equal(F.gemv_4bit(x, packed, out=out, state=state), y)
    into = torch.empty_like(dense)
    assert torch.equal(F.dequantize_4bit(packed, state, out=into), dense)


def linear4bit(nested: bool = True, **options: Any) -> Any:
    torch.manual_seed(4)
    layer = bnb.nn.Linear4bit(
        128, 64, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32
    )
    return layer.to("cpu")


def test_eval_mode_keeps_the_canonical_weight(patched: PatchReport) -> None:
    layer = linear4bit().eval()
    # As on a CPU with AVX512-BF16, where stock repacks the weight and rounds its scales to bf16.
    layer.support_avx512bf16_for_cpu = True
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    dense = qlk.dequantize(quantized_weight_of(layer.weight, layer.weight.quant_state))
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        y = layer(x)
    assert_linear(y, x, dense.double(), layer.bias.detach())
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.skipif(not F.has_avx512bf16(), reason="stock repacks for AVX512-BF16 alone")
def test_a_layer_repacked_before_the_patch_still_runs() -> None:
    layer = linear4bit().eval()
    layer.support_avx512bf16_for_cpu = True
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        stock = layer(x)
        assert layer.weight.quant_state.packing_format_for_cpu
        qlk.patch_bitsandbytes()
        try:
            assert torch.equal(layer(x), stock)
        finally:
            qlk.unpatch_bitsandbytes()


def test_patch_is_undone_and_repeatable() -> None:
    w, x = weight(32, 128), torch.ones(2, 128)
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    stock = torch.ops.bitsandbytes.dequantize_4bit
    before = stock(packed, state.absmax, 64, "nf4", w.shape, torch.float32)
    report = qlk.patch_bitsandbytes()
    assert report == qlk.patch_bitsandbytes()
    names = ("gemm_4bit", "quantize_4bit", "quantize_blockwise", "dequantize_blockwise")
    assert {f"bitsandbytes::{name}" for name in names} <= set(report.overridden)
    for name in (*report.overridden, *report.left):
        assert name in str(report)
    with qlk.backend("reference"):
        ours = bnb.matmul_4bit(x, packed, state)
    qlk.unpatch_bitsandbytes()
    qlk.unpatch_bitsandbytes()
    assert torch.equal(stock(packed, state.absmax, 64, "nf4", w.shape, torch.float32), before)
    dense = qlk.dequantize(quantized_weight_of(packed, state)).double()
    for y in (ours, bnb.matmul_4bit(x, packed, state)):
        assert_linear(y, x, dense)


def test_patch_asks_the_registry(patched: PatchReport, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kernels.ops import quantized_matmul as module

    asked = []
    select = module.select

    def recording(problem: Any) -> Any:
        asked.append((problem.op, problem.tokens, problem.double_quant))
        return select(problem)

    monkeypatch.setattr(module, "select", recording)
    packed, state = F.quantize_4bit(weight(32, 128), quant_type="nf4", compress_statistics=True)
    bnb.matmul_4bit(torch.ones(2, 128), packed, state)
    assert asked == [("quantized_matmul", 2, True)]


def test_patched_layer_compiles_without_a_break(patched: PatchReport) -> None:
    layer = linear4bit()
    x = torch.randn(4, 128, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, wanted = compiled(x), layer(x)
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_operands_share_memory(storage: torch.dtype) -> None:
    packed, state = F.quantize_4bit(
        weight(32, 128), quant_type="nf4", compress_statistics=True, quant_storage=storage
    )
    operands = operands_of(packed, state)
    assert operands.codes.data_ptr() == packed.data_ptr()
    assert operands.scale_codes is not None
    assert operands.scale_codes.data_ptr() == state.absmax.data_ptr()
    assert operands.shape == (32, 128)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_with_the_identity_is_the_input(
    patched: PatchReport, quant_type: str, dtype: torch.dtype
) -> None:
    """To the bit, small elements too: products whose error is small beside the norm alone, as of
    integers, are not what bitsandbytes' callers had."""
    packed, state = F.quantize_4bit(torch.eye(192, dtype=dtype), quant_type=quant_type)
    for tokens in (1, 3):
        x = (weight(tokens, 192) * 0.1).to(dtype)
        x[:, ::7] *= 2**-10
        got = [bnb.matmul_4bit(x.clone().requires_grad_(), packed.t(), state)]
        with torch.no_grad():
            got.append(bnb.matmul_4bit(x, packed.t(), state))
        assert all(torch.equal(y, x) for y in got)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_fp16_gemv_rounds_the_weight_as_bitsandbytes_defines_it(
    patched: PatchReport, quant_type: str
) -> None:
    packed, state = F.quantize_4bit(weight(64, 256).half(), quant_type=quant_type)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(7)).half()
    wanted = torch.nn.functional.linear(x, F.dequantize_4bit(packed, state))
    assert torch.equal(F.gemv_4bit(x, packed.t(), state=state), wanted)


def tables() -> dict[str, torch.Tensor]:
    shuffled = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    return {
        "dynamic": F.create_dynamic_map(),
        "unsigned": F.create_dynamic_map(signed=False),
        "linear": F.create_linear_map(),
        "fp8": F.create_fp8_map(True, 4, 3, 8),
        "in any order": F.create_dynamic_map()[shuffled],
    }


def blockwise_cases() -> Iterator[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(3)
    for shape, block_size in (((3, 333), 64), ((7, 1001), 100), ((1,), 256), ((0,), 64)):
        yield torch.randn(shape, generator=generator), block_size
    values = torch.randn(9000, generator=generator)
    values[:4096], values[4096], values[8999] = 0.0, torch.nan, torch.inf
    yield values, 1024
    yield torch.randn(2, 5000, generator=generator).t() * 1e-39, 8192


@pytest.mark.parametrize("table", tables())
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bit_ops_are_the_reference_to_the_bit(
    patched: PatchReport, table: str, dtype: torch.dtype
) -> None:
    code, ops = tables()[table], torch.ops.bitsandbytes
    entries, order = code.sort(stable=True)
    for values, block_size in blockwise_cases():
        values = values.to(dtype)
        codes, absmax = ops.quantize_blockwise(values, code, block_size)
        wanted, scales = quantize_blockwise_reference(values, entries, block_size)
        assert codes.shape == values.shape and torch.equal(order[wanted.long()], codes.long())
        assert torch.equal(absmax.nan_to_num(), scales.nan_to_num())
        assert torch.equal(absmax.isnan(), scales.isnan())
        decoded = ops.dequantize_blockwise(codes, absmax, code, block_size, dtype)
        dense = dequantize_blockwise_reference(codes, absmax, code, block_size, dtype)
        torch.testing.assert_close(decoded, dense, rtol=0, atol=0, equal_nan=True)
        into = torch.empty_like(decoded)
        ops.dequantize_blockwise.out(codes, absmax, code, block_size, dtype, into)
        torch.testing.assert_close(into, dense, rtol=0, atol=0, equal_nan=True)


def test_a_tie_goes_to_the_lower_entry_and_zeros_to_zero(patched: PatchReport) -> None:
    code = F.create_linear_map()
    midpoints = (code[:-1] + code[1:]) * 0.5
    values = torch.cat([midpoints, torch.ones(1)])  # absmax 1: they are normalised as they are
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code, 256)
    assert absmax.tolist() == [1.0] and torch.equal(codes[:255].long(), torch.arange(255))
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(torch.zeros(70), code, 64)
    assert absmax.tolist() == [0.0, 0.0] and torch.all(code[codes.long()] == 0)


def test_every_level_of_the_machine_gives_the_same_codes() -> None:
    from qlora_kernels.backends.cpu.blockwise import (
        dequantize_blockwise_cpu,
        quantize_blockwise_cpu,
    )
    from qlora_kernels.backends.cpu.common import machine_isa

    code = F.create_dynamic_map()
    for values, block_size in blockwise_cases():
        wanted, _ = quantize_blockwise_reference(values, code, block_size)
        for isa in range(machine_isa() + 1):
            codes, absmax = quantize_blockwise_cpu(values, code, block_size, isa)
            assert torch.equal(codes, wanted)
            for dtype in DTYPES:
                got = dequantize_blockwise_cpu(codes, absmax, code, block_size, dtype, isa)
                dense = dequantize_blockwise_reference(codes, absmax, code, block_size, dtype)
                torch.testing.assert_close(got, dense, rtol=0, atol=0, equal_nan=True)


def test_eight_bit_optimizers_train_as_they_did() -> None:
    """On CPUs their states are quantized by these ops; stock takes a neighbouring code at times."""

    def trained() -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        optimizer = bnb.optim.AdamW8bit([weight], lr=1e-2, min_8bit_size=0)
        for _ in range(3):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()

    stock = trained()
    qlk.patch_bitsandbytes()
    try:
        # Three steps of 0.01: a code next to the nearest one moves a weight by a part of a step.
        difference = (trained() - stock).abs()
        assert float(difference.max()) < 0.03 and float(difference.mean()) < 1e-3
    finally:
        qlk.unpatch_bitsandbytes()


@pytest.mark.parametrize("nested", [False, True])
def test_kept_operands_are_of_the_tensors_that_are_there(nested: bool) -> None:
    """A layer that has run sees other tensors, and other values in the same ones."""
    torch.manual_seed(12)

    def layer() -> Any:
        options = {"compress_statistics": nested, "quant_type": "nf4"}
        made = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, **options)
        return made.to("cpu").requires_grad_(False)

    one, other, x = layer(), layer(), torch.randn(2, 128)
    fused = copy.deepcopy(one)
    qlk.accelerate(nn.Sequential(fused), verbose=False)

    def check(stock: Any) -> None:
        with torch.no_grad():
            wanted = stock(x)
            assert (fused(x) - wanted).norm() < 1e-6 * wanted.norm()

    check(one)
    fused.weight.data = other.weight.data.clone()
    one.weight.data = other.weight.data
    check(one)
    for name in ("absmax", "code", "offset", "state2"):  # another tensor, or nothing
        for target in (one, fused):
            value = copy.deepcopy(getattr(other.weight.quant_state, name))
            setattr(target.weight.quant_state, name, value)
        check(one)
    second = fused.weight.quant_state.state2
    if second is not None:
        one.weight.quant_state.state2.absmax = 2 * second.absmax
        second.absmax = 2 * second.absmax
        check(one)
    for target in (one, fused):
        target.weight.data.zero_()
    check(one)
    # What is kept is no part of the layer: neither copied nor left behind.
    assert HELD_OPERANDS in fused.__dict__
    assert HELD_OPERANDS not in copy.deepcopy(fused).__dict__
    assert qlk.deaccelerate(nn.Sequential(fused)) == 1 and HELD_OPERANDS not in fused.__dict__
