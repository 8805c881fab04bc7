"""QuantizedExperts: a mixture of experts whose stacked matrices are stored in 4 bits each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora_kernels.autograd.qlora_linear import qlora_linear_of
from qlora_kernels.autograd.quantized_matmul import quantized_linear_of
from qlora_kernels.formats.operands import StoredOperands, WeightOperands, assemble_operands
from qlora_kernels.formats.quantized_weight import (
    TENSOR_FIELDS,
    QuantizedWeight,
    bits_of,
    values_of,
)

_FIELDS = tuple(field for field in TENSOR_FIELDS if field != "scale_codebook")


class QuantizedExperts(nn.Module):
    """Mixin of transformers' expert modules: y_t = Σ_k w_tk · down_e(act(up_e(x_t))), e = e_tk.

    Each expert's matrix [N, K] of a projection is a quantized weight of its own; an expert's
    products run as `quantized_linear` over the tokens that chose it. Stored as
    parameters: `<projection>` u8 [experts, ceil(N·K/2)], `<projection>_absmax` or
    `<projection>_scale_*` [experts, …] and the other tensors that the format has, and
    `<projection>_codebook` [16]; floating-point values as integers of the same bits.

    While `adapters` is set, projection -> list of (A [experts, R, K], B [experts, N, R], scaling),
    a product includes them, the first one fused.

    The class it is mixed into has `act_fn`, or `_apply_gate`, and says by `has_gate` which.
    """

    num_experts: int
    has_gate: bool
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

    def operands(self, projection: str, expert: int) -> WeightOperands | StoredOperands:
        """What the ops take of one expert's matrix; it shares the stack's memory."""
        fmt = self.projections[projection].format
        held: dict[str, torch.Tensor] = {}
        for field in _FIELDS:
            stacked = self._parameters.get(_name(projection, field))
            if stacked is not None:
                held[field] = values_of(stacked[expert], field, fmt)
        codebook = self._parameters.get(f"{projection}_codebook")
        table = None if codebook is None else codebook.view(torch.float32)
        return assemble_operands(fmt, self.projections[projection].shape, held, table)

    def product(self, x: torch.Tensor, projection: str, expert: int) -> torch.Tensor:
        """x [tokens, K] times an expert's matrix, and what adapters add: [tokens, N]."""
        operands = self.operands(projection, expert)
        adapters = self.__dict__.get("adapters", {}).get(projection, ())
        if not adapters:
            return quantized_linear_of(x, operands, None, False, projection)
        a, b, scaling = adapters[0]
        y = qlora_linear_of(x, operands, a[expert], b[expert], scaling, None, 0.0, False)
        for a, b, scaling in adapters[1:]:
            y = y + scaling * (x @ a[expert].to(x.dtype).t() @ b[expert].to(x.dtype).t())
        return y

    def dequantize(self, projection: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense stack [experts, N, K]."""
        like = self.projections[projection]
        ops, dense = torch.ops.qlora_kernels, []
        for expert in range(self.num_experts):
            operands = self.operands(projection, expert)
            stored = isinstance(operands, StoredOperands)
            op = ops.stored_dequantize if stored else ops.dequantize
            dense.append(op(*operands, dtype or like.dtype))
        return torch.stack(dense)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, K]; top_k_index and top_k_weights [tokens, k]: the experts of each
        token (an index of `num_experts` means none) and their weights."""
        tokens, chosen = top_k_index.shape
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=self.num_experts + 1).tolist()
        up = "gate_up_proj" if self.has_gate else "up_proj"
        parts, start = [], 0
        for expert, count in enumerate(counts):
            rows = order[start : start + count]
            start += count
            if expert == self.num_experts:
                parts.append(hidden_states.new_zeros(count, hidden_states.shape[-1]))
            elif count:
                x = hidden_states[rows // chosen]
                h = self.product(x, up, expert)
                h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
                parts.append(self.product(h, "down_proj", expert))
        # Back into the tokens' order, and summed there: an order that does not depend on timing.
        y = torch.cat(parts)[order.argsort()]
        weighted = y * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        described = (
            f"{name}={self.num_experts}x{list(like.shape)} {like.format.name}"
            for name, like in self.projections.items()
        )
        return ", ".join(described)


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
