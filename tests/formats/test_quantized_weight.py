"""QuantizedWeight: assembled from checked parts; packing; the registry and overrides."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qlora_kernels as qlk
from qlora_kernels.errors import ArgumentError, ArgumentTypeError
from qlora_kernels.formats.packing import (
    dense_to_nibbles,
    pack,
    pack_dense,
    packed_size,
    unpack,
)
from tests.tolerances import assert_linear


def parts(double_quant: bool = False) -> dict[str, Any]:
    qw = qlk.quantize(torch.randn(33, 65), double_quant=double_quant)
    return {"shape": qw.shape, "dtype": qw.dtype, "format": "nf4", **qw.tensors()}


def assemble(**changes: Any) -> qlk.QuantizedWeight:
    arguments = parts() | changes
    return qlk.QuantizedWeight.from_parts(arguments.pop("codes"), **arguments)


@pytest.mark.parametrize("double_quant", [False, True])
def test_parts_make_the_weight_they_came_from(double_quant: bool) -> None:
    arguments = parts(double_quant)
    qw = qlk.QuantizedWeight.from_parts(arguments.pop("codes"), **arguments)
    assert qw.format.double_quant is double_quant
    for name, tensor in qw.tensors().items():
        source = arguments.get(name)
        assert source is None or tensor.data_ptr() == source.data_ptr()
    assert qlk.dequantize(qw).shape == (33, 65)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": torch.zeros(3)}, ArgumentTypeError, "codes must be torch.uint8"),
        ({"codes": [1]}, ArgumentTypeError, "codes must be a tensor"),
        ({"codes": torch.zeros(5, dtype=torch.uint8)}, ArgumentError, "codes must be 1073 elem"),
        ({"absmax": torch.zeros(33)}, ArgumentError, "absmax must be 34 elements"),
        ({"absmax": torch.zeros(34).double()}, ArgumentTypeError, "absmax must be torch.float32"),
        ({"absmax": torch.zeros(34, device="meta")}, ArgumentError, "absmax must be on cpu"),
        ({"absmax": None}, ArgumentError, "scales must be either absmax or all of"),
        ({"scale_codes": torch.zeros(34).byte()}, ArgumentError, "scales must be either"),
        ({"dtype": torch.float64}, ArgumentTypeError, "dtype must be float32, float16"),
        ({"shape": (-1, 65)}, ArgumentError, "shape must be non-negative"),
        ({"format": "nf5"}, ArgumentError, r"name must be one of \['af4', 'any4', 'bof2s'"),
        ({"block_size": 48}, ArgumentError, "block_size must be a power of two"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        assemble(**changes)


def test_replace_and_moves_keep_the_meaning() -> None:
    qw = qlk.quantize(torch.randn(4, 64))
    assert torch.equal(qlk.dequantize(qw.to("cpu")), qlk.dequantize(qw))
    narrow = dataclasses.replace(qw, dtype=torch.bfloat16)
    assert qlk.dequantize(narrow).dtype == torch.bfloat16
    with pytest.raises(dataclasses.FrozenInstanceError):
        qw.dtype = torch.float16  # type: ignore[misc]


@pytest.mark.parametrize("numel", [0, 1, 2, 7, 64, 1001])
def test_packing_round_trip(numel: int) -> None:
    codes = torch.randint(0, 16, (numel,), dtype=torch.uint8)
    packed = pack(codes, pad_code=7)
    assert packed.numel() == packed_size(numel)
    assert torch.equal(unpack(packed, numel), codes)
    if numel % 2:
        assert int(packed[-1]) & 15 == 7


def test_the_even_element_is_in_the_high_nibble() -> None:
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x12, 0x30]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 7, 8, 9, 1001])
def test_dense_codes_are_one_stream_of_bits(bits: int, numel: int) -> None:
    codes = torch.randint(0, 2**bits, (numel,), dtype=torch.uint8)
    packed = pack_dense(codes, bits)
    assert packed.numel() == packed_size(numel, bits) == -(-numel * bits // 8)
    stream = "".join(f"{int(code):0{bits}b}" for code in codes)
    stream += "0" * (-len(stream) % 8)
    assert packed.tolist() == [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]
    assert torch.equal(dense_to_nibbles(packed, numel, bits), pack(codes))


def test_packing_refuses_what_four_bits_cannot_hold() -> None:
    with pytest.raises(ArgumentError, match="codes must be below 16, got 16"):
        pack(torch.tensor([16], dtype=torch.uint8))
    with pytest.raises(ArgumentTypeError, match="codes must be uint8"):
        pack(torch.tensor([1]))
    with pytest.raises(ArgumentError, match="packed must be 2 bytes, got 1"):
        unpack(torch.zeros(1, dtype=torch.uint8), 4)


def test_a_registered_codebook_runs_everywhere_at_once() -> None:
    values = [-1.0, -0.3, 0.0, 0.2, 1.0]
    qlk.register_format(qlk.Codebook("five_values", values=values))
    assert "five_values" in qlk.list_formats()
    weight = torch.randn(33, 65)
    qw = qlk.quantize(weight, format="five_values", block_size=32, double_quant=False)
    dense = qlk.dequantize(qw)
    normalised = dense[0, :32] / weight[0, :32].abs().max()
    distance = (normalised[:, None] - torch.tensor(values)).abs().amin(dim=1)
    assert distance.max() < 1e-6
    x = torch.randn(3, 65)
    assert_linear(qlk.quantized_linear(x, qw), x, dense.double())
    layer = qlk.QLoRALinear.from_linear(torch.nn.Linear(65, 33), rank=2, format="five_values")
    layer(x).sum().backward()
    assert layer.lora_b.grad is not None


def test_every_block_size_of_the_contract() -> None:
    weight = torch.randn(3, 5000)
    for block_size in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        qw = qlk.quantize(weight, block_size=block_size)
        error = (qlk.dequantize(qw) - weight).abs().max()
        assert 0 < error < 0.2 * weight.abs().max()
    for bad in (8, 48, 8192, 64.0, True):
        with pytest.raises(ArgumentError, match="block_size must be a power of two in 16 … 4096"):
            qlk.quantize(weight, block_size=bad)  # type: ignore[arg-type]


def test_constants_made_while_tracing_or_inferring_serve_training_afterwards() -> None:
    """A format nobody used yet meets inference mode and fake tensors first."""
    name = "first_met_in_inference"
    qlk.register_format(qlk.Codebook(name, values=[-1.0, -0.4, 0.1, 1.0]))
    weight, x = torch.randn(8, 64), torch.randn(2, 64, requires_grad=True)
    with FakeTensorMode():
        fake = qlk.quantize(torch.empty(8, 64), name, check_finite=False)
        assert qlk.quantized_linear(torch.empty(2, 64), fake).shape == (2, 8)
    with torch.inference_mode():
        qlk.quantized_linear(x, qlk.quantize(weight, name))
    qw = qlk.quantize(weight, name)
    qlk.quantized_linear(x, qw).sum().backward()
    assert torch.equal(qw.operands().codebook[:4], torch.tensor([-1.0, -0.4, 0.1, 1.0]))
