"""QuantizedExperts: a mixture of experts whose stacked matrices are stored in 4 bits each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora_kernels.autograd.experts import experts_linear
from qlora_kernels.formats.operands import StoredOperands
from qlora_kernels.formats.quantized_weight import (
    TENSOR_FIELDS,
    QuantizedWeight,
    bits_of,
    values_of,
)
from qlora_kernels.nn.expert_adapter import ExpertAdapter, joined

_FIELDS = tuple(field for field in TENSOR_FIELDS if field != "scale_codebook")
_STACKED = StoredOperands._fields[: StoredOperands._fields.index("codebook")]


class QuantizedExperts(nn.Module):
    """Mixin of transformers' expert modules: y_t = Σ_k w_tk · down_e(act(up_e(x_t))), e = e_tk.

    Each expert's matrix [N, K] of a projection is a quantized weight of its own, and multiplies the
    tokens that chose it (`experts_linear`). Stored as parameters: `<projection>` u8
    [experts, ceil(N·K/2)], `<projection>_absmax` or `<projection>_scale_*` [experts, …] and the
    other tensors that the format has, and `<projection>_codebook` [16]; floating-point values as
    integers of the same bits.

    A product includes the projection's own adapter (`add_adapter`), and while `adapters` is set,
    projection -> list of (A [experts, R, K], B [experts, N, R], scaling), those too.

    The class it is mixed into has `act_fn`, or `_apply_gate`, and says by `has_gate` which; biases
    [experts, N] are its parameters `<projection>_bias`, dense. Where it stores its dense matrices
    as [K, N], `source_is_transposed` is set.
    """

    num_experts: int
    has_gate: bool
    source_is_transposed: bool = False
    projections: dict[str, QuantizedWeight]
    act_fn: Any
    _apply_gate: Any

    def hold(self, projection: str, experts: Sequence[QuantizedWeight]) -> None:
        """Take the matrices of a projection, one an expert and all of one format, in the place of
        what is there."""
        # Shape, dtype and format of a matrix, without its values.
        first = experts[0]
        kept = dict(self.__dict__.get("projections", {}))
        kept[projection] = QuantizedWeight.empty(first.shape, first.dtype, first.format)
        self.__dict__["projections"] = kept
        for name, parameter in expert_parameters(projection, experts).items():
            self.register_parameter(name, parameter)

    def operands(self, projection: str) -> StoredOperands:
        """What the ops take of a projection: its tensors [experts, …] with the shape of one matrix;
        they share the layer's memory."""
        fmt, shape = self.projections[projection].format, self.projections[projection].shape
        held: dict[str, torch.Tensor | None] = dict.fromkeys(_STACKED)
        for field in _FIELDS:
            stacked = self._parameters.get(_name(projection, field))
            if stacked is not None:
                held[field] = values_of(stacked, field, fmt)
        tables = held.pop("tables", None)
        if tables is None:
            codebook = self.get_parameter(f"{projection}_codebook").view(torch.float32)
        else:
            # [experts, values], or [experts, N, values] where every row has a table of its own.
            codebook = tables.view(self.num_experts, -1, len(fmt.codebook.values))
            codebook = codebook if fmt.lut_scope == "row" else codebook[:, 0]
        return StoredOperands(
            **held,  # type: ignore[arg-type]
            codebook=codebook,
            shape=shape,
            block_size=fmt.block_size,
            scale_block_size=fmt.scale_block_size,
            code_bits=fmt.code_bits,
            scale_store=fmt.scale_store,
        )

    def product(
        self, x: torch.Tensor, counts: torch.Tensor, projection: str, owners: torch.Tensor
    ) -> torch.Tensor:
        """Rows of x, sorted by expert, times their experts' matrices, and what biases and adapters
        add; `owners` [M] is the expert of each row, for the rest see `experts_linear`."""
        adapters = [*self.__dict__.get("adapters", {}).get(projection, ())]
        own = self.adapter(projection)
        adapters += [] if own is None else [own.factors()]
        adapter = joined(adapters) if adapters else None
        y = experts_linear(x, counts, self.operands(projection), adapter, projection)
        biases = self._parameters.get(f"{projection}_bias")
        if biases is None:
            return y
        with_none = torch.nn.functional.pad(biases, (0, 0, 0, 1))  # rows of no expert stay zero
        return y + with_none[owners].to(y.dtype)

    def adapter(self, projection: str) -> ExpertAdapter | None:
        """The adapter of a projection that is the module's own, its submodule
        `<projection>_adapter`."""
        own: ExpertAdapter | None = self._modules.get(f"{projection}_adapter")  # type: ignore[assignment]
        return own

    def add_adapter(
        self, projection: str, *, rank: int, alpha: float, rslora: bool = False
    ) -> ExpertAdapter:
        """Give a projection an adapter of its own, in the place of the one it has; its dropout is
        always 0.

        Raises:
            ArgumentTypeError, ArgumentError: as `ExpertAdapter`.
        """
        adapter = ExpertAdapter(
            self.num_experts,
            self.projections[projection].shape,
            rank=rank,
            alpha=alpha,
            rslora=rslora,
            device=self.get_parameter(projection).device,
        )
        self.add_module(f"{projection}_adapter", adapter)
        return adapter

    @property
    def swaps_factors(self) -> bool:
        """Whether PEFT takes the dense matrices [K, N] for [N, K]; see `to_files`."""
        return self.source_is_transposed and not getattr(self, "is_transposed", False)

    def dequantize(self, projection: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense stack [experts, N, K]."""
        stacked, dtype = self.operands(projection), dtype or self.projections[projection].dtype
        dense = []
        for expert in range(self.num_experts):
            own = [part[expert] if isinstance(part, torch.Tensor) else part for part in stacked]
            if stacked.codebook.dim() == 1:
                own[StoredOperands._fields.index("codebook")] = stacked.codebook
            dense.append(torch.ops.qlora_kernels.stored_dequantize(*own, dtype))
        return torch.stack(dense)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, K]; top_k_index and top_k_weights [tokens, k]: the experts of each
        token (an index of `num_experts` means none) and their weights."""
        tokens, chosen = top_k_index.shape
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)
        # Not bincount, the size of whose result depends on values.
        counts = experts.new_zeros(self.num_experts + 1)
        counts = counts.scatter_add(0, experts, torch.ones_like(experts)).cpu()
        x = hidden_states[order // chosen]
        owners = experts[order]
        h = self.product(x, counts, "gate_up_proj" if self.has_gate else "up_proj", owners)
        h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
        # Back into the tokens' order, and summed there: an order that does not depend on timing.
        y = self.product(h, counts, "down_proj", owners)[order.argsort()]
        weighted = y * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        described = (
            f"{name}={self.num_experts}x{list(like.shape)} {like.format.name}"
            for name, like in self.projections.items()
        )
        return ", ".join(described)


class QuantizedBatchedExperts(QuantizedExperts):
    """The same for Llama 4's, which get every token once an expert, scaled by its weight before the
    product: y_et = down_e(act(gate_e) · up_e) of x_et, zero where the expert was not chosen."""

    has_gate = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """hidden_states [experts · tokens, K], an expert's tokens after another's, to the same."""
        x = hidden_states.reshape(-1, self.projections["gate_up_proj"].shape[1])
        each, none = x.shape[0] // self.num_experts, x.new_zeros(0, dtype=torch.int64)
        counts = torch.tensor([each] * self.num_experts + [0])
        gate, up = self.product(x, counts, "gate_up_proj", none).chunk(2, dim=-1)
        return self.product(up * self.act_fn(gate), counts, "down_proj", none)


def _name(projection: str, field: str) -> str:
    return projection if field == "codes" else f"{projection}_{field}"


def expert_parameters(
    projection: str, experts: Sequence[QuantizedWeight]
) -> dict[str, nn.Parameter]:
    """The stacked tensors of a projection's experts, by the names of `QuantizedExperts`."""
    found = {}
    for field in _FIELDS:
        if getattr(experts[0], field) is not None:
            found[_name(projection, field)] = torch.stack([getattr(e, field) for e in experts])
    first = experts[0]
    if first.tables is None:
        found[f"{projection}_codebook"] = first.format.codebook.table(first.device).clone()
    return {
        name: nn.Parameter(bits_of(tensor), requires_grad=False) for name, tensor in found.items()
    }
