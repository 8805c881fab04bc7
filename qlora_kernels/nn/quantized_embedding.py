"""QuantizedEmbedding: a frozen embedding whose table is stored in 4 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.operands import WeightOperands
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.nn.stored_weight import StoredWeight
from qlora_kernels.ops import quantize


class QuantizedEmbedding(StoredWeight, nn.Embedding):
    """Rows of Ŵ [num_embeddings, embedding_dim], dequantized as they are looked up.

    Where embedding_dim is a multiple of the block size and the format is `Format.plain`, only the
    rows that are asked for are decoded, bit for bit what they are in the whole table; otherwise all
    of it is, for each call.

    Attributes:
        weight, weight_*: the quantized table, frozen; see `StoredWeight`.
    """

    def __init__(self, qw: QuantizedWeight, padding_idx: int | None = None) -> None:
        """Holds qw's tensors, uncopied.

        Raises:
            ArgumentTypeError: not a QuantizedWeight.
            ArgumentError: qw is not 2-D.
        """
        nn.Module.__init__(self)
        self._hold(qw)
        self.num_embeddings, self.embedding_dim = qw.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        format: str | Format = "nf4",
        block_size: int | None = None,
        double_quant: bool | None = None,
    ) -> QuantizedEmbedding:
        """Quantize an embedding; it is left as it is.

        Raises:
            ArgumentTypeError: not an nn.Embedding.
            ArgumentError: one with max_norm, which changes rows as they are read; or as
                `qlora_kernels.quantize`.
        """
        name = cls.__name__
        if not isinstance(embedding, nn.Embedding):
            raise type_error(name, "embedding", "an nn.Embedding", type(embedding).__name__)
        if embedding.max_norm is not None:
            raise argument_error(name, "embedding", "without max_norm", embedding.max_norm)
        qw = quantize(embedding.weight, format, block_size, double_quant)
        return cls(qw, embedding.padding_idx).train(embedding.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integer ids of any shape to [..., embedding_dim] in the dtype the table had."""
        if self.embedding_dim % self.format.block_size or not self.format.plain:
            return F.embedding(input, self.dequantize())
        ids = input.reshape(-1)
        rows: torch.Tensor = torch.ops.qlora_kernels.dequantize(*self._rows(ids), self.weight_dtype)
        return rows.view(*input.shape, self.embedding_dim)

    def _rows(self, ids: torch.Tensor) -> WeightOperands:
        """The operands of the matrix that these rows make, with scales that are decoded."""
        stored = self.operands()
        assert isinstance(stored, WeightOperands)  # the format is plain
        per_row = self.embedding_dim // stored.block_size
        codes = stored.codes.view(self.num_embeddings, -1)[ids].view(-1)
        at = (ids[:, None] * per_row + torch.arange(per_row, device=ids.device)).view(-1)
        if stored.absmax is not None:
            scales = stored.absmax[at]
        else:
            nested = self.quantized_weight.operands()
            assert isinstance(nested, WeightOperands)
            assert nested.scale_codes is not None and nested.scale_codebook is not None
            assert nested.scale_absmax is not None and nested.scale_offset is not None
            decoded = nested.scale_codebook[nested.scale_codes[at].long()]
            scales = decoded * nested.scale_absmax[at // nested.scale_block_size]
            scales = scales + nested.scale_offset
        return stored._replace(
            codes=codes,
            absmax=scales,
            scale_codes=None,
            scale_absmax=None,
            scale_offset=None,
            scale_codebook=None,
            shape=(ids.numel(), self.embedding_dim),
        )

    def reset_parameters(self) -> None:
        """Nothing: a stored table is not drawn anew."""

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format_repr()}"
