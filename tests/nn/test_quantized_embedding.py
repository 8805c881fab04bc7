"""QuantizedEmbedding: the rows of the dequantized table, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_kernels as qlk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 192, 96, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_rows_are_those_of_the_table(dtype: torch.dtype, dim: int, nested: bool) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(300, dim).to(dtype)
    layer = qlk.QuantizedEmbedding.from_embedding(table, double_quant=nested)
    wanted = qlk.dequantize(qlk.quantize(table.weight, double_quant=nested))
    ids = torch.tensor([[0, 299, 7], [7, 7, 150]])
    assert layer(ids).dtype == dtype
    assert torch.equal(layer(ids), wanted[ids])
    assert layer(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, dim)


@pytest.mark.parametrize("format", qlk.list_formats())
def test_state_is_kept(format: str) -> None:
    torch.manual_seed(1)
    layer = qlk.QuantizedEmbedding.from_embedding(
        nn.Embedding(40, 64, padding_idx=3), format=format
    )
    assert layer.padding_idx == 3 and "40, 64, padding_idx=3, format=" in repr(layer)
    other = qlk.QuantizedEmbedding.from_embedding(nn.Embedding(40, 64), format=format)
    ids = torch.arange(40)
    assert not torch.equal(layer(ids), other(ids))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(ids), other(ids))
    assert all(not parameter.requires_grad for parameter in layer.parameters())


def test_what_is_refused() -> None:
    with pytest.raises(qlk.errors.ArgumentTypeError, match=r"embedding must be an nn\.Embedding"):
        qlk.QuantizedEmbedding.from_embedding(nn.Linear(4, 4))
    with pytest.raises(qlk.errors.ArgumentError, match="without max_norm"):
        qlk.QuantizedEmbedding.from_embedding(nn.Embedding(4, 64, max_norm=1.0))
