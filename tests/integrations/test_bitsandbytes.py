"""bitsandbytes' own ops and layers on these kernels, against the reference, not against stock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.integrations.bitsandbytes import (
    PatchReport,
    operands_of,
    quantized_weight_of,
)

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
    wanted = x.detach().double() @ dense.T + bias
    assert (y - wanted).norm() <= 1e-6 * wanted.norm()
    y.backward(torch.ones_like(y))
    grad = torch.ones(3, 5, 32, dtype=torch.float64) @ dense
    assert (x.grad - grad).norm() <= 1e-6 * grad.norm()
    with torch.no_grad():
        assert torch.equal(bnb.matmul_4bit(x, packed, state, bias=bias), y.detach())


def test_gemv_and_out_overloads(patched: PatchReport) -> None:
    w = weight(32, 96)
    packed, state = F.quantize_4bit(w, quant_type="fp4", compress_statistics=True)
    dense = F.dequantize_4bit(packed, state)
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(2))
    y = F.gemv_4bit(x, packed, state=state)
    assert (y - x @ dense.T).norm() <= 1e-6 * y.norm()
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
    assert (y - x @ dense.T - layer.bias).norm() <= 1e-6 * y.norm()
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


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
    assert {"bitsandbytes::gemm_4bit", "bitsandbytes::quantize_4bit"} <= set(report.overridden)
    for name in (*report.overridden, *report.left):
        assert name in str(report)
    with qlk.backend("reference"):
        ours = bnb.matmul_4bit(x, packed, state)
    qlk.unpatch_bitsandbytes()
    qlk.unpatch_bitsandbytes()
    assert torch.equal(stock(packed, state.absmax, 64, "nf4", w.shape, torch.float32), before)
    assert (bnb.matmul_4bit(x, packed, state) - ours).norm() <= 1e-6 * ours.norm()


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
def test_fp16_gemv_rounds_the_weight_as_bitsandbytes_defines_it(
    patched: PatchReport, quant_type: str
) -> None:
    packed, state = F.quantize_4bit(weight(64, 256).half(), quant_type=quant_type)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(7)).half()
    wanted = torch.nn.functional.linear(x, F.dequantize_4bit(packed, state))
    assert torch.equal(F.gemv_4bit(x, packed.t(), state=state), wanted)


def test_eight_bit_ops_are_left_to_bitsandbytes(patched: PatchReport) -> None:
    """Its kernels are as exact: decoding is equal to the bit, for every dtype and odd blocks."""
    left = {"bitsandbytes::quantize_blockwise", "bitsandbytes::dequantize_blockwise"}
    assert set(patched.left) == left and not left & set(patched.overridden)
    values = torch.randn(3, 333, generator=torch.Generator().manual_seed(3))
    code = F.create_dynamic_map()
    for block_size in (64, 100, 256):
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code, block_size)
        blocks = values.view(-1).split(block_size)
        assert torch.equal(absmax, torch.stack([block.abs().max() for block in blocks]))
        scale = absmax.repeat_interleave(block_size)[: values.numel()].view(values.shape)
        for dtype in DTYPES:
            got = torch.ops.bitsandbytes.dequantize_blockwise(
                codes, absmax, code, block_size, dtype
            )
            assert torch.equal(got, (code[codes.long()] * scale).to(dtype))
        # A code is the nearest or its neighbour.
        nearest = (values[..., None] - code * scale[..., None]).abs().argmin(dim=-1)
        assert int((codes.long() - nearest).abs().max()) <= 1
