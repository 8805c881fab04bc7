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
from qlora_kernels.ops.library import nothing_traces


class QuantizedEmbedding(StoredWeight, nn.Embedding):
    """Rows of Ŵ [num_embeddings, embedding_dim], dequantized as they are looked up.

    Of a format that is `Format.plain` only the blocks that hold the rows that are asked for are
    decoded, bit for bit what they are in the whole table; of another one all of it is, for each
    call.

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
        """Integer ids of any shape to [..., embedding_dim] in the dtype the table had.

        Raises:
            IndexError: an id outside 0 … num_embeddings - 1; on a GPU, and in a compiled graph, an
                assertion.
        """
        ids = input.reshape(-1)
        self._check_ids(ids)
        if not self.format.plain:
            return F.embedding(input, self.dequantize())
        if self.embedding_dim % self.format.block_size:
            return self._straddling_rows(ids).view(*input.shape, self.embedding_dim)
        stored = self._plain_operands()
        per_row = self.embedding_dim // stored.block_size
        blocks = ids[:, None] * per_row + torch.arange(per_row, device=ids.device)
        codes = stored.codes.view(self.num_embeddings, -1)[ids]
        rows = self._decoded(codes, blocks)
        return rows.view(*input.shape, self.embedding_dim)

    def _check_ids(self, ids: torch.Tensor) -> None:
        """Indexing would take a negative id for one from the end."""
        if ids.device.type == "cpu" and nothing_traces():
            if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.num_embeddings):
                raise IndexError(
                    f"QuantizedEmbedding: ids must be in 0 … {self.num_embeddings - 1}, got "
                    f"{int(ids.min())} … {int(ids.max())}"
                )
        else:
            within = ((ids >= 0) & (ids < self.num_embeddings)).all()
            torch._assert_async(within, "QuantizedEmbedding: an id is out of range")

    def _plain_operands(self) -> WeightOperands:
        stored = self.operands()
        assert isinstance(stored, WeightOperands)  # the format is plain
        return stored

    def _straddling_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [ids, embedding_dim] where they do not begin with a block: as many blocks as a
        row can touch are decoded, and the row is cut out of them."""
        stored, dim = self._plain_operands(), self.embedding_dim
        size, device = stored.block_size, ids.device
        count = (dim + size - 2) // size + 1
        begin = ids * dim
        blocks = (begin // size)[:, None] + torch.arange(count, device=device)
        # The table ends with whatever its last block has, and a row there needs no block after it.
        last = (self.num_embeddings * dim - 1) // size
        bytes_ = blocks[:, :, None] * (size // 2) + torch.arange(size // 2, device=device)
        codes = stored.codes[bytes_.clamp(max=stored.codes.numel() - 1)]
        wide = self._decoded(codes, blocks.clamp(max=last))
        columns = (begin % size)[:, None] + torch.arange(dim, device=device)
        return wide.view(-1, count * size).gather(1, columns)

    def _decoded(self, codes: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """The values [ids, elements] of codes [ids, …] whose scales are those of blocks
        [ids, blocks], which are decoded here."""
        stored, at = self._plain_operands(), blocks.view(-1)
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
        rows, elements = blocks.shape[0], blocks.shape[1] * stored.block_size
        gathered = stored._replace(
            codes=codes.reshape(-1),
            absmax=scales,
            scale_codes=None,
            scale_absmax=None,
            scale_offset=None,
            scale_codebook=None,
            shape=(rows, elements),
        )
        values: torch.Tensor = torch.ops.qlora_kernels.dequantize(*gathered, self.weight_dtype)
        return values

    def reset_parameters(self) -> None:
        """Nothing: a stored table is not drawn anew."""

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format_repr()}"
