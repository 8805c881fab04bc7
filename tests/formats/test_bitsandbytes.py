"""bitsandbytes' state-dict layout, byte for byte against the real package."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.errors import CheckpointError
from qlora_kernels.formats import bitsandbytes as layout
from qlora_kernels.formats.packing import unpack

bnb = pytest.importorskip("bitsandbytes.functional")


def _real_state(weight: torch.Tensor, quant_type: str, nested: bool) -> dict[str, torch.Tensor]:
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=nested
    )
    parts = state.as_dict(packed=True)
    return {"weight": packed, **{f"weight.{key}": value for key, value in parts.items()}}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_state_dict_survives_the_round_trip(
    quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    real = _real_state(torch.randn(96, 128, dtype=dtype), quant_type, nested)
    weight = layout.from_state_dict(real)
    ours = layout.to_state_dict(weight)
    assert list(ours.keys() - real.keys()) == [] and list(real.keys() - ours.keys()) == []
    for key, tensor in real.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_and_absmax_equal_the_real_ones(quant_type: str) -> None:
    weight = torch.randn(64, 256)
    weight[3, 64:128] = 0
    real = _real_state(weight, quant_type, nested=False)
    ours = layout.to_state_dict(qlk.quantize(weight, quant_type, double_quant=False))
    codes, real_codes = (
        unpack(state["weight"].reshape(-1), weight.numel()) for state in (ours, real)
    )
    if quant_type == "fp4":  # its CPU path writes either zero, code 0 or 8, for tiny weights
        codes, real_codes = (c.masked_fill(c == 8, 0) for c in (codes, real_codes))
    assert torch.equal(codes, real_codes)
    assert torch.equal(ours["weight.absmax"], real["weight.absmax"])


def test_dequantized_values_equal_the_real_ones() -> None:
    weight = torch.randn(64, 256, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    real = bnb.dequantize_4bit(packed, state)
    loaded = layout.from_state_dict(_real_state(weight, "nf4", nested=True))
    assert torch.equal(qlk.dequantize(loaded), real)


def test_quant_storage_is_a_view() -> None:
    weight = qlk.quantize(torch.randn(32, 64))
    stored = layout.to_state_dict(weight, "layer.weight.", torch.bfloat16)
    assert stored["layer.weight"].shape == (512, 1)
    assert torch.equal(layout.from_state_dict(stored, "layer.weight.").codes, weight.codes)


def test_a_quant_map_in_the_file_wins() -> None:
    state = layout.to_state_dict(qlk.quantize(torch.randn(32, 64), double_quant=False))
    state["weight.quant_map"] = state["weight.quant_map"] * 2
    doubled = qlk.dequantize(layout.from_state_dict(state))
    state["weight.quant_map"] = state["weight.quant_map"] / 2
    assert torch.equal(doubled, 2 * qlk.dequantize(layout.from_state_dict(state)))


@pytest.mark.parametrize("missing", ["weight.absmax", "weight.quant_map", "weight"])
def test_missing_keys_are_named(missing: str) -> None:
    state = layout.to_state_dict(qlk.quantize(torch.randn(32, 64)))
    del state[missing]
    with pytest.raises(CheckpointError, match=f"must hold '{missing}'"):
        layout.from_state_dict(state)


def test_truncated_codes_and_foreign_states_are_refused() -> None:
    state = layout.to_state_dict(qlk.quantize(torch.randn(32, 64)))
    with pytest.raises(CheckpointError, match="codes must be"):
        layout.from_state_dict({**state, "weight": state["weight"][:-1]})
    key = "weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(CheckpointError, match="must be JSON"):
        layout.from_state_dict({**state, key: state[key][:-3]})
