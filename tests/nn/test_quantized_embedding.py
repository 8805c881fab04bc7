"""QuantizedEmbedding: the rows of the dequantized table, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_kernels as qlk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 192, 96, 5, 131])
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


@pytest.mark.parametrize("dim", [1056, 1088])
def test_a_row_costs_its_own_blocks(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that begin within a block, and within a byte, are cut out of the blocks around them."""
    torch.manual_seed(2)
    layer = qlk.QuantizedEmbedding.from_embedding(nn.Embedding(50, dim))
    monkeypatch.setattr(layer, "dequantize", lambda *_: pytest.fail("all of it is decoded"))
    wanted = qlk.dequantize(layer.quantized_weight)
    ids = torch.tensor([49, 0, 33])
    assert torch.equal(layer(ids), wanted[ids])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), wanted[ids])


@pytest.mark.parametrize("dim", [64, 5])
@pytest.mark.parametrize("wrong", [-1, 300])
def test_ids_out_of_range_are_refused(dim: int, wrong: int) -> None:
    layer = qlk.QuantizedEmbedding.from_embedding(nn.Embedding(300, dim))
    with pytest.raises(IndexError, match="ids must be in 0 … 299"):
        layer(torch.tensor([3, wrong]))
    if (dim, wrong) == (64, -1):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with pytest.raises(RuntimeError, match="out of range"):
            compiled(torch.tensor([3, wrong]))


def test_what_is_refused() -> None:
    with pytest.raises(qlk.errors.ArgumentTypeError, match=r"embedding must be an nn\.Embedding"):
        qlk.QuantizedEmbedding.from_embedding(nn.Linear(4, 4))
    with pytest.raises(qlk.errors.ArgumentError, match="without max_norm"):
        qlk.QuantizedEmbedding.from_embedding(nn.Embedding(4, 64, max_norm=1.0))
