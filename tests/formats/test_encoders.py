"""Encoders, shifts, scale stores and learners: what each promises."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import qlora_kernels as qlk
import qlora_kernels.formats as F
from qlora_kernels.errors import ArgumentError, ArgumentTypeError
from qlora_kernels.formats import Format, get_format
from qlora_kernels.formats.learned import kmeans
from qlora_kernels.formats.packing import unpack
from qlora_kernels.formats.scale_store import scale_table
from qlora_kernels.reference.encode_scales import decode_stored_scales, encode_scales_reference
from tests.tolerances import assert_linear

BASES = ("nf4", "bof4s", "int4_asym", "mxfp4", "nvfp4", "bof2s")


def with_fields(name: str, **fields: Any) -> Format:
    return dataclasses.replace(get_format(name), encode_against="decoded", **fields)


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def errors(w: torch.Tensor, fmt: str | Format, **options: Any) -> torch.Tensor:
    """Squared error of each block, fp64."""
    qw = qlk.quantize(w, fmt, **options)
    squares = (qlk.dequantize(qw).double() - w.double()).square()
    return squares.view(-1, qw.format.block_size).sum(dim=1)


def decibels(w: torch.Tensor, fmt: str | Format, **options: Any) -> float:
    total = errors(w, fmt, **options).sum() / w.double().square().sum()
    return 10 * math.log10(float(total))


def test_a_format_in_five_lines_runs_everywhere() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    laplace = scipy_stats.laplace

    @F.register("laplace4")
    def laplace4() -> Format:
        return Format(codebook=F.quantile_book(laplace.ppf, bits=4),
                      block_size=64, scale_rule="absmax", scale_store="e4m3",
                      encoder="scale_search")  # fmt: skip

    assert "laplace4" in qlk.list_formats() and get_format("laplace4") == dataclasses.replace(
        laplace4(), name="laplace4"
    )
    w = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(64, 128) * 0.9999 + 5e-5)
    with qlk.backend("reference"):
        by_reference = qlk.quantize(w, "laplace4")
        dense = qlk.dequantize(by_reference)
    qw = qlk.quantize(w, "laplace4")
    assert qw.bits_per_parameter == qw.format.bits_per_param(w.shape)
    assert qw.bits_per_parameter == pytest.approx(4.125, abs=0.01)
    assert torch.equal(qlk.dequantize(qw), dense)
    unsearched = dataclasses.replace(get_format("laplace4"), encoder="nearest")
    assert decibels(w, "laplace4") < decibels(w, unsearched) - 0.1
    layer = qlk.QLoRALinear.from_linear(torch.nn.Linear(128, 64), rank=2, format="laplace4")
    x = torch.randn(3, 128)
    layer(x).sum().backward()
    assert layer.lora_b.grad is not None
    assert_linear(qlk.quantized_linear(x, qw), x, dense.double())


@pytest.mark.parametrize("encoder", ["scale_search", "least_squares"])
@pytest.mark.parametrize("name", BASES)
def test_searched_scales_are_no_worse_in_any_block(name: str, encoder: str) -> None:
    w = weight(64, 512)
    plain = with_fields(name)
    searched = dataclasses.replace(plain, encoder=encoder)
    before, after = errors(w, plain), errors(w, searched)
    # A store that blocks share moves all scales a little when one changes.
    shared = plain.scale_store in ("double_quant", "sign7")
    assert (after <= before * (1.05 if shared else 1 + 1e-5) + 1e-9).all()
    gain = 10 * math.log10(float(before.sum() / after.sum()))
    least = {"mxfp4": 0.2 if encoder == "scale_search" else -1e-6}.get(name, 0.2)
    assert gain >= least
    assert qlk.quantize(w, plain).nbytes == qlk.quantize(w, searched).nbytes


def test_scale_search_gains_half_a_decibel_and_signed_scales_another() -> None:
    w = weight(256, 1024)
    nf4 = decibels(w, "nf4")
    assert decibels(w, with_fields("nf4", encoder="scale_search")) < nf4 - 0.5
    best = with_fields("bof4s", encoder="scale_search")
    assert decibels(w, best) < nf4 - 0.9
    assert qlk.quantize(w, best).bits_per_parameter <= 4.127


def test_importance_moves_the_error_to_what_counts_less() -> None:
    w = weight(64, 256)
    columns = torch.ones(256)
    columns[::4] = 25.0
    for fmt in (with_fields("nf4", encoder="scale_search"), get_format("kmeans_row")):
        plain = (qlk.dequantize(qlk.quantize(w, fmt)) - w).square()
        weighted = (qlk.dequantize(qlk.quantize(w, fmt, importance=columns)) - w).square()
        assert (weighted * columns).sum() < 0.98 * (plain * columns).sum()
        assert weighted.sum() > plain.sum()
    whole = qlk.quantize(w, "kmeans", importance=columns.expand(64, -1))
    assert torch.equal(whole.tables, qlk.quantize(w, "kmeans", importance=columns).tables)


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (torch.ones(63), ArgumentError, r"one that broadcasts to \(4, 64\)"),
        (torch.ones(2, 4, 64), ArgumentError, "one that broadcasts"),
        (-torch.ones(64), ArgumentError, "finite and not negative"),
        (torch.full((64,), math.nan), ArgumentError, "finite and not negative"),
        (torch.ones(64, dtype=torch.int64), ArgumentTypeError, "a floating-point tensor"),
        ([1.0], ArgumentTypeError, "a floating-point tensor"),
    ],
)
def test_bad_importance_is_refused(importance: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"quantize: importance must be {message}"):
        qlk.quantize(torch.randn(4, 64), "kmeans", importance=importance)


def entropy(qw: qlk.QuantizedWeight) -> float:
    """Mean entropy of a block's codes, in bits."""
    blocks = unpack(qw.codes, qw.numel).view(-1, qw.format.block_size)
    shares = torch.nn.functional.one_hot(blocks.long(), 16).double().mean(dim=1)
    return float(-torch.xlogy(shares, shares).sum(dim=1).mean() / math.log(2))


@pytest.mark.parametrize("shift", ["mean", "median", "mse", "entropy"])
def test_shifts_follow_blocks_that_are_off_centre(shift: Any) -> None:
    w = weight(64, 256) + weight(64 * 256 // 64, 1, seed=1).repeat_interleave(64, 1).view(64, 256)
    plain = with_fields("nf4", scale_store="fp16")
    shifted = dataclasses.replace(plain, shift=shift)
    assert decibels(w, shifted) < decibels(w, plain) - 1.0
    qw = qlk.quantize(w, shifted)
    assert qw.bits_per_parameter == 4.5 and qw.shift is not None
    median = dataclasses.replace(plain, shift="median")
    if shift == "mse":
        assert decibels(w, shifted) < decibels(w, median)
    if shift == "entropy":
        assert entropy(qw) > entropy(qlk.quantize(w, median)) + 0.01


def test_shifts_in_8_bits_are_stored_and_read_back() -> None:
    w = weight(300, 256) + 0.3
    fmt = with_fields("nf4", shift="mean")
    qw = qlk.quantize(w, fmt)
    # Codes, and twice what double quantization takes.
    assert qw.bits_per_parameter == pytest.approx(4 + 2 * (8 / 64 + 32 / (64 * 256)), abs=0.01)
    assert decibels(w, fmt) < decibels(w, "nf4")
    x = torch.randn(3, 256)
    assert_linear(qlk.quantized_linear(x, qw), x, qlk.dequantize(qw).double())


def test_minmax_reaches_both_ends_of_a_block() -> None:
    w = weight(16, 256) + 5.0
    fmt = dataclasses.replace(get_format("int4_asym"), scale_store="fp32")
    dense = qlk.dequantize(qlk.quantize(w, fmt)).view(-1, 64)
    blocks = w.view(-1, 64)
    torch.testing.assert_close(dense.amax(1), blocks.amax(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(dense.amin(1), blocks.amin(1), rtol=1e-6, atol=0)
    # All one number: no range, and the shift is the number.
    assert (qlk.dequantize(qlk.quantize(torch.full((4, 64), 2.5), fmt)) == 2.5).all()


def test_signed_absmax_takes_the_maximum_to_the_end_of_the_table() -> None:
    w = weight(64, 64)
    largest = w.gather(1, w.abs().argmax(dim=1, keepdim=True))[:, 0]
    for name, sign in (("bof4s", 1), ("int4_full", -1)):
        qw = qlk.quantize(w, with_fields(name, scale_store="fp32"))
        assert torch.equal(qw.absmax, largest * sign)
        dense = qlk.dequantize(qw)
        assert torch.equal(dense.gather(1, w.abs().argmax(1, keepdim=True))[:, 0], largest)


def test_power_of_two_is_ocps_rule() -> None:
    w = torch.zeros(5, 32)
    w[:, 0] = torch.tensor([1.0, 5.99, 6.0, 7.999, 8.0])
    qw = qlk.quantize(w, "mxfp4")
    assert [int(code) - 127 for code in qw.scale_codes] == [-2, 0, 0, 0, 1]
    assert qlk.dequantize(qw)[:, 0].tolist() == [1.0, 6.0, 6.0, 6.0, 8.0]


def test_rms_scales_serve_a_table_of_standard_normal_values() -> None:
    """Lloyd-Max for N(0, 1) at 16 levels errs -20.222 dB; the root mean square of a block, known
    exactly, makes it a little better (HIGGS at p = 1)."""
    levels = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326]  # Max, 1960
    book = qlk.Codebook("lloyd16", [*(-v for v in reversed(levels)), *levels])
    fmt = Format("lloyd16", book, block_size=128, scale_rule="rms", scale_store="fp16")
    got = decibels(weight(512, 1024), fmt)
    assert -20.36 < got < -20.24


STORES = ("fp16", "bf16", "e4m3", "e8m0", "int8_mean", "uint8_min", "sign7")


@pytest.mark.parametrize("store", STORES)
def test_stored_scales_are_the_nearest_that_there_are(store: str) -> None:
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    if store == "sign7":
        scales[::3] *= -1
    stored = encode_scales_reference(store, scales, 256)
    decoded = decode_stored_scales(store, stored, 256)
    steps = {"fp16": 2**-11, "bf16": 2**-8, "e4m3": 2**-4, "e8m0": 1 / 3, "int8_mean": 1 / 256}
    # Relative to the scale itself, or where 256 of them share a step, to the largest.
    shared = store in ("int8_mean", "uint8_min", "sign7")
    reach = scales.abs().max() if shared else scales.abs()
    widest = steps.get(store, 1 / 254) * (1 + 1e-5)
    assert ((decoded - scales).abs() <= widest * reach).all()
    again = encode_scales_reference(store, decoded, 256, stored.second)
    if stored.codes is not None and stored.offset is None:
        assert torch.equal(again.codes, stored.codes)
        # No other code of the table comes nearer.
        table = scale_table(store).nan_to_num(torch.inf)
        second = 1.0 if stored.second is None else stored.second
        per_scale = (
            torch.ones(1000)
            if stored.second is None
            else (second.expand(4) if len(second) == 1 else second).repeat_interleave(256)[:1000]
        )
        best = (table[None, :] * per_scale[:, None] - scales[:, None]).abs().amin(dim=1)
        assert ((decoded - scales).abs() <= best + 1e-7).all()


def test_int8_mean_is_torchaos() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

    absmax = torch.rand(1024, generator=torch.Generator().manual_seed(1)) + 1.0
    # Blocks of one weight each: the weights are their scales.
    codes, factors, mean = NF4Tensor.double_quantize_scalers(absmax, 1, 256)
    ours = encode_scales_reference("int8_mean", absmax, 256)
    assert ours.offset.item() == pytest.approx(mean.item(), rel=1e-6)
    torch.testing.assert_close(128 / factors, ours.second)
    # torchao clamps 128 to 127, of which our table has no code either.
    assert (codes.int() - ours.codes.view(torch.int8).int()).abs().max() <= 1
    assert (codes == ours.codes.view(torch.int8)).float().mean() > 0.99


def test_scales_that_a_store_cannot_hold_are_refused() -> None:
    w = weight(4, 64) * 1e6
    fmt = with_fields("nf4", scale_store="fp16")
    with pytest.raises(ArgumentError, match=r"w must be of scales that fp16 holds \(at most 65504"):
        qlk.quantize(w, fmt)
    assert qlk.dequantize(qlk.quantize(w, with_fields("nf4", scale_store="bf16"))).isfinite().all()


def test_learned_tables_hold_their_pins_and_the_means_of_their_cells() -> None:
    w = weight(8, 1024)
    qw = qlk.quantize(w, with_fields("kmeans", scale_store="fp32"))
    table = qw.tables.float()
    assert len(table) == 16 and (table.diff() > 0).all()
    assert {-1.0, 0.0, 1.0} <= set(table.tolist())
    scales = qw.absmax.repeat_interleave(64)
    x, m2 = (w.reshape(-1) / scales).double(), scales.double().square()
    cell = torch.bucketize(x.float(), (table[1:] + table[:-1]) / 2)
    means = torch.bincount(cell, m2 * x) / torch.bincount(cell, m2)
    free = ~torch.isin(table, torch.tensor([-1.0, 0.0, 1.0]))
    assert (means - table)[free].abs().max() < 2e-3
    assert decibels(w, "kmeans") < decibels(w, "nf4") - 0.15


def test_a_table_per_row_learns_each_row() -> None:
    """Rows of two distributions: their tables differ, and err less than one for both."""
    w = weight(8, 2048)
    w[::2] = w[::2].sign() * w[::2].abs().pow(3)
    one, each = get_format("kmeans"), get_format("kmeans_row")
    qw = qlk.quantize(w, each)
    assert qw.tables.shape == (8 * 16,)
    assert not torch.equal(*qw.tables.view(8, 16)[:2])
    assert decibels(w, each) < decibels(w, one) - 0.1
    assert qw.bits_per_parameter == qw.format.bits_per_param((8, 2048))


def test_unpinned_learners_give_up_the_ends() -> None:
    free = dataclasses.replace(kmeans(pins=()), name="free")
    table = qlk.quantize(weight(64, 256), free).tables
    assert table.max() < 1.0 and table.min() > -1.0
    few = dataclasses.replace(free.with_codebook(get_format("nf2_offset").codebook), pack="dense")
    qw = qlk.quantize(weight(64, 256), few)
    assert len(qw.tables) == 4 and qw.format.code_bits == 2
    assert qw.bits_per_parameter == qw.format.bits_per_param((64, 256)) < 2.15


def test_any4_beats_its_uniform_grid() -> None:
    w = weight(32, 1024)
    assert decibels(w, "any4") < decibels(w, "int4_asym") - 0.5


def test_dense_and_nibble_packing_hold_the_same_weight() -> None:
    w = weight(33, 65)
    for name in ("bof3s", "nf2_symmetric"):
        dense, nibble = get_format(name), dataclasses.replace(get_format(name), pack="nibble")
        a, b = qlk.quantize(w, dense), qlk.quantize(w, nibble)
        assert torch.equal(qlk.dequantize(a), qlk.dequantize(b))
        bits = 3 if "3" in name else 2
        assert a.codes.numel() == -(-w.numel() * bits // 8) < b.codes.numel()


def test_bitsandbytes_layout_refuses_what_it_cannot_hold() -> None:
    from qlora_kernels.formats.bitsandbytes import to_state_dict

    for name in ("kmeans", "bof4s"):
        with pytest.raises(ArgumentError, match="to_state_dict: format must be one of"):
            to_state_dict(qlk.quantize(weight(4, 64), name))
