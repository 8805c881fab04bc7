"""What every registered format must do, whoever registered it: the codec's half."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.backends.registry import entries
from qlora_kernels.errors import ArgumentError
from qlora_kernels.formats import StoredOperands
from qlora_kernels.formats.packing import dense_to_nibbles, unpack
from qlora_kernels.ops import search, stored
from qlora_kernels.reference import (
    decode_scales_reference,
    decode_shifts_reference,
    decode_stored_scales_reference,
    dequantize_reference,
    dequantize_stored_reference,
    learn_tables,
)

FORMATS = qlk.list_formats()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Whole blocks, rows that straddle blocks, a short last block, one element, a vector.
SHAPES = [(16, 256), (33, 65), (5, 25), (3, 1), (1, 1), (77,)]
EIGHT = (-1.0, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 1.0)
per_format = pytest.mark.parametrize("name", FORMATS)


def weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scales_and_shifts(qw: qlk.QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded, one an element, flat."""
    operands = qw.operands()
    if isinstance(operands, StoredOperands):
        scales = decode_stored_scales_reference(operands)
        shifts = decode_shifts_reference(operands)
    else:
        scales, shifts = decode_scales_reference(operands), None
    shifts = torch.zeros_like(scales) if shifts is None else shifts
    size = qw.format.block_size
    return tuple(x.repeat_interleave(size)[: qw.numel] for x in (scales, shifts))  # type: ignore[return-value]


def tables_of(qw: qlk.QuantizedWeight) -> torch.Tensor:
    """fp32 [rows, L]: the format's table, or those that were learned."""
    levels = len(qw.format.codebook.values)
    if qw.tables is not None:
        return qw.tables.view(-1, levels).float()
    return torch.tensor(qw.format.codebook.values).view(1, levels)


def codes_of(qw: qlk.QuantizedWeight) -> torch.Tensor:
    packed, bits = qw.codes, qw.format.code_bits
    return unpack(packed if bits == 4 else dense_to_nibbles(packed, qw.numel, bits), qw.numel)


@per_format
@pytest.mark.parametrize("shape", [(16, 256), (33, 65), (0, 64), (1, 1), (300, 512)], ids=str)
def test_bits_are_those_of_the_bytes(name: str, shape: tuple[int, ...]) -> None:
    qw = qlk.quantize(weight(shape), name)
    stored = {field: (t.numel(), t.dtype) for field, t in qw.tensors().items()}
    assert stored == qw.format.tensor_sizes(shape)
    assert qw.nbytes == sum(t.numel() * t.element_size() for t in qw.tensors().values())
    if qw.numel:
        assert qw.bits_per_parameter == qw.nbytes * 8 / qw.numel
        assert qw.bits_per_parameter == pytest.approx(qw.format.bits_per_param(shape))


@per_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_nearest_under_the_decoded_scale(name: str, shape: tuple[int, ...]) -> None:
    """No code would come nearer, but for "original" encoding, which aims at another scale."""
    w = weight(shape)
    fmt = dataclasses.replace(qlk.get_format(name), encode_against="decoded")
    qw = qlk.quantize(w, fmt)
    scales, shifts = scales_and_shifts(qw)
    tables = tables_of(qw)
    per_row = tables.repeat_interleave(qw.numel // tables.shape[0], dim=0).double()
    reachable = per_row * scales.double()[:, None] + shifts.double()[:, None]
    best = (w.reshape(-1, 1).double() - reachable).abs().amin(dim=1)
    got = (w.double() - qlk.dequantize(qw).double()).abs().reshape(-1)
    # Both roundings of w = table·scale + shift, and that of w - shift, are relative to these.
    rounding = 4 * 2.0**-24 * (scales.abs() + shifts.abs() + w.abs().reshape(-1))
    assert (got <= best + rounding).all()


@per_format
def test_larger_weights_get_no_smaller_values(name: str) -> None:
    fmt = qlk.get_format(name)
    w = weight((8, 4 * fmt.block_size))
    dense = qlk.dequantize(qlk.quantize(w, fmt)).view(-1, fmt.block_size)
    order = w.view(-1, fmt.block_size).argsort(dim=1)
    assert (dense.gather(1, order).diff(dim=1) >= 0).all()


@per_format
def test_what_is_dequantized_keeps_its_codes(name: str) -> None:
    """With the table as learned: a learner may do better on fewer values."""
    fmt = qlk.get_format(name)
    if fmt.shift != "none" and fmt.lut_scope != "global":
        pytest.skip("its table need not reach the ends of a block, whose range then shrinks")
    w = weight((4, 512))
    first = qlk.quantize(w, fmt)
    dense = qlk.dequantize(first)
    for row, table in enumerate(tables_of(first).expand(len(w), -1)):
        fixed = fmt
        if first.tables is not None:
            fixed = dataclasses.replace(fmt, lut_scope="global", pins=())
            fixed = fixed.with_codebook(qlk.Codebook("fixed", table.tolist()))
        again = codes_of(qlk.quantize(dense[row], fixed)).long()
        before = codes_of(first)[row * 512 : (row + 1) * 512].long()
        # By value: FP4 has two codes for 0.
        assert torch.equal(table[again], table[before])


@per_format
def test_zeros_stay_zeros(name: str) -> None:
    w = weight((4, 256))
    w[1] = 0.0
    dense = qlk.dequantize(qlk.quantize(w, name))
    fmt = qlk.get_format(name)
    if fmt.scale_store in ("double_quant", "int8_mean"):
        # The decoded scale of a block of zeros is near 0, and its code the nearest to 0.
        smallest = min(abs(value) for value in fmt.codebook.values)
        assert dense[1].abs().max() <= smallest * 0.02 * w.abs().max() + 1e-30
    else:
        assert (dense[1] == 0).all()
    everything = qlk.quantize(torch.zeros(5, 77), name)
    assert (qlk.dequantize(everything) == 0).all()


@per_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused_or_come_out_as_nan(name: str, bad: float) -> None:
    fmt = qlk.get_format(name)
    w = weight((8, 256))
    w[3, 5] = bad
    with pytest.raises(ArgumentError, match=r"1 other values, the first .* at flat index 773"):
        qlk.quantize(w, fmt)
    dense = qlk.dequantize(qlk.quantize(w, fmt, check_finite=False))
    blocks = dense.view(-1, fmt.block_size)
    hit = (3 * 256 + 5) // fmt.block_size
    assert blocks[hit].isnan().all()
    others = torch.cat([blocks[:hit], blocks[hit + 1 :]])
    known = torch.cat([(b := w.view(-1, fmt.block_size))[:hit], b[hit + 1 :]])
    near = (others - known).abs() <= 2 * known.abs().amax(dim=1, keepdim=True)
    assert (others.isnan() | near).all()


@per_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_dequantizes_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    able = {
        entry.backend
        for entry in entries("dequantize")
        if entry.available() is None and entry.backend.split(":")[0] in ("cpu", "reference")
    }
    assert "reference" in able
    for shape in SHAPES:
        qw = qlk.quantize(weight(shape).to(dtype), name)
        operands = qw.operands()
        if isinstance(operands, StoredOperands):
            wanted = dequantize_stored_reference(operands, dtype)
        else:
            wanted = dequantize_reference(operands, shape, dtype)
        assert wanted.shape == shape and wanted.isfinite().all()
        for backend in sorted(able):
            with qlk.backend(backend):
                assert torch.equal(qlk.dequantize(qw), wanted), (backend, shape)
        out = torch.full(shape, math.nan, dtype=dtype)
        assert torch.equal(qlk.dequantize(qw, out=out), wanted)


@per_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_quantize_to_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        w = weight(shape).to(dtype)
        with qlk.backend("reference"):
            wanted = qlk.quantize(w, name).tensors()
        got = qlk.quantize(w, name).tensors()
        assert got.keys() == wanted.keys()
        for field, tensor in wanted.items():
            assert torch.equal(got[field], tensor), (field, shape)


@per_format
def test_a_weight_is_put_together_again_from_its_parts(name: str) -> None:
    qw = qlk.quantize(weight((33, 65)), name)
    parts = qw.tensors()
    again = qlk.QuantizedWeight.from_parts(
        parts.pop("codes"), shape=qw.shape, dtype=qw.dtype, format=name, **parts
    )
    assert again.format == qw.format and again.nbytes == qw.nbytes
    assert torch.equal(qlk.dequantize(again), qlk.dequantize(qw))
    for field in parts:
        lacking = {key: part for key, part in parts.items() if key != field}
        with pytest.raises(ArgumentError):
            qlk.QuantizedWeight.from_parts(
                qw.codes, shape=qw.shape, dtype=qw.dtype, format=name, **lacking
            )


@per_format
def test_small_and_large_weights_keep_their_relative_error(name: str) -> None:
    fmt = qlk.get_format(name)
    w = weight((16, 256))
    dense = qlk.dequantize(qlk.quantize(w, fmt))
    for factor in (2.0**-10, 2.0**10):
        scaled = qlk.dequantize(qlk.quantize(w * factor, fmt)) / factor
        assert (scaled - w).norm() == pytest.approx(float((dense - w).norm()), rel=0.02)


@pytest.mark.parametrize("cols", [256, 77])
def test_what_is_done_in_parts_does_not_depend_on_them(
    cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are looked up and learned, and blocks that are searched, some at a time."""
    w = weight((7, cols))
    formats = [
        "any4",
        "kmeans_row",
        dataclasses.replace(
            qlk.get_format("kmeans_row").with_codebook(qlk.Codebook("eight", EIGHT)),
            pack="dense",
            pins=(),
            scale_store="fp16",
        ),
        dataclasses.replace(qlk.get_format("bof4s"), encoder="scale_search"),
        dataclasses.replace(qlk.get_format("nvfp4"), encoder="least_squares"),
    ]
    whole = [qlk.quantize(w, fmt) for fmt in formats]
    dense = [qlk.dequantize(qw) for qw in whole]
    monkeypatch.setattr(stored, "_LOOKUP_ELEMENTS", 3 * cols)
    monkeypatch.setattr(learn_tables, "_CHUNK_ELEMENTS", 2 * cols)
    monkeypatch.setattr(search, "_PART_ELEMENTS", 3 * 64)
    for fmt, qw, wanted in zip(formats, whole, dense, strict=True):
        again = qlk.quantize(w, fmt)
        for field, tensor in qw.tensors().items():
            assert torch.equal(again.tensors()[field], tensor), field
        assert torch.equal(qlk.dequantize(qw), wanted)
