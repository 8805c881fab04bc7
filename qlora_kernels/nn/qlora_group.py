"""QLoRAGroup: layers that are given the same x, computed together: x is cast and saved for backward
once, its product with all adapters is one, and grad_x is summed in place."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora_kernels.autograd.qlora_group import qlora_group_of
from qlora_kernels.backends.kept import requested
from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.operands import WeightOperands
from qlora_kernels.nn.qlora_linear import QLoRALinear
from qlora_kernels.nn.quantized_linear import QuantizedLinear
from qlora_kernels.reference.qlora_group import GroupMember

# After so many forwards in a row that a layer made for another one in vain, it stops.
MOST_UNCLAIMED = 2


class _Pending:
    """Outputs that one layer's call made for the others, and what they are outputs of."""

    def __init__(
        self, x: torch.Tensor, leader: int, outputs: dict[int, torch.Tensor], states: list[Any]
    ) -> None:
        # Weak: without a graph nothing else of this keeps x alive, and when x goes, so do these.
        self.x = weakref.ref(x, lambda _: outputs.clear())
        self.leader = leader
        self.outputs = outputs
        self.unclaimed: set[int] = set()
        self.states = states
        self.surroundings = _surroundings(x)

    def clear(self) -> None:
        """Forget the outputs."""
        self.outputs.clear()


class QLoRAGroup:
    """`QLoRALinear` and `QuantizedLinear` layers of one in_features that share their input.

    `group(x)` computes all of them. Once attached, a model that calls them one after the other, as
    `q_proj(x)`, `k_proj(x)`, `v_proj(x)`, does the same: the first call with a tensor computes all,
    and the others return what is theirs. They do so only for the same tensor object at the same
    version, and if nothing else that matters has changed since (their parameters by object, address
    and version, training mode, dropout, autocast, grad mode); otherwise a layer computes on its
    own. Outputs that nobody asks for are dropped with x, by backward, or by the next call, and a
    layer whose outputs stay unclaimed twice is no longer computed ahead. While torch.compile traces
    layers are computed one by one (its graphs cast and save x once anyway); `group(x)` compiles.

    Layers that cannot join (merged, on another device, sharded, of a format that kernels do not
    take as it is stored, of another block size or batch_invariant) compute on their own.

    The outputs are those of the separate layers, dropout included, and so are gradients, up to the
    order in which grad_x is summed. They share one node of the graph: call backward once for all of
    them, or with retain_graph. Members stay where they are in the model: parameters, state dicts
    and adapter files know nothing of a group. A copied or pickled member brings its siblings.

    Attributes:
        members: the layers, in the order in which dropout draws its seeds.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        """Groups the layers for `group(x)`; see `attach`.

        Raises:
            ArgumentTypeError: a member is no QLoRALinear or QuantizedLinear.
            ArgumentError: fewer than two, one twice, or another in_features.
        """
        name = type(self).__name__
        for member in members:
            if not isinstance(member, QuantizedLinear):
                rule = "QLoRALinear or QuantizedLinear layers"
                raise type_error(name, "members", rule, type(member).__name__)
        if len(members) < 2 or len(set(map(id, members))) != len(members):
            raise argument_error(name, "members", "two or more different layers", len(members))
        widths = sorted({int(member.in_features) for member in members})  # type: ignore[arg-type]
        if len(widths) > 1:
            raise argument_error(name, "members", "of one in_features", widths)
        self.members: tuple[QuantizedLinear, ...] = tuple(members)  # type: ignore[arg-type]
        self.clear()

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every member's output [..., N] for x [..., K], in order. Hooks of the members do not run.

        Raises:
            ArgumentTypeError, ArgumentError: as the members.
        """
        joined = self._joined(x, range(len(self.members)))
        ys = iter(self._compute(x, joined) if len(joined) > 1 else ())
        return tuple(
            next(ys) if len(joined) > 1 and i in joined else member.compute(x)
            for i, member in enumerate(self.members)
        )

    def attach(self) -> None:
        """Let calls of the members be answered by the group, until `detach`.

        Raises:
            ArgumentError: a member is in another group.
        """
        for member in self.members:
            if member.group not in (None, self):
                raise argument_error(type(self).__name__, "members", "in no other group", member)
        for member in self.members:
            member.group = self

    def detach(self) -> None:
        """Let every member compute on its own again."""
        for member in self.members:
            if member.group is self:
                member.group = None
        self.clear()

    def clear(self) -> None:
        """Forget outputs that were not asked for, and which layers were not asked."""
        self._pending: _Pending | None = None
        count = len(self.members)
        self._unclaimed = [[0] * count for _ in range(count)]

    def output_of(self, member: QuantizedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The member's output for x, or None: it must compute on its own."""
        if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or x.is_inference():
            return None
        # A replica of a member has its group but is none of its members.
        index = next((i for i, own in enumerate(self.members) if own is member), None)
        if index is None:
            return None
        pending = self._pending
        if pending is not None and pending.x() is x:
            output = self._claim(pending, index, x)
            if output is not None:
                return output
        return self._lead(index, x)

    def _claim(self, pending: _Pending, index: int, x: torch.Tensor) -> torch.Tensor | None:
        state = _state(self.members[index])
        same = state is not None and pending.states[index] == state
        if not same or pending.surroundings != _surroundings(x):
            return None
        output = pending.outputs.pop(index, None)
        if output is not None:
            pending.unclaimed.discard(index)
            self._unclaimed[pending.leader][index] = 0
        if not pending.outputs:
            self._pending = None
        return output

    def _lead(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """Computes the member and those that are likely to be asked for next."""
        stale, self._pending = self._pending, None
        if stale is not None:
            for other in stale.unclaimed:
                self._unclaimed[stale.leader][other] += 1
            stale.clear()
        unclaimed = self._unclaimed[index]
        likely = [i for i in range(len(self.members)) if unclaimed[i] < MOST_UNCLAIMED]
        joined = self._joined(x, likely)
        if len(joined) < 2 or index not in joined:
            return None
        states = [_state(member) for member in self.members]
        if any(states[i] is None for i in joined):
            return None
        outputs: dict[int, torch.Tensor] = {}
        pending = _Pending(x, index, outputs, states)
        ys = self._compute(x, joined, weakref.WeakMethod(pending.clear))
        outputs.update(zip(joined, ys, strict=True))
        pending.unclaimed = set(joined) - {index}
        self._pending = pending
        return outputs.pop(index)

    def _joined(self, x: torch.Tensor, candidates: Sequence[int]) -> dict[int, GroupMember]:
        """Those of the members that can be computed together: the first that can sets the rules."""
        joined: dict[int, GroupMember] = {}
        rules: tuple[Any, ...] | None = None
        for i in candidates:
            member = self.members[i]
            operands = _joining(member, x)
            if operands is None:
                continue
            own = (operands.block_size, operands.scale_block_size, member.batch_invariant)
            rules = rules or own
            if own == rules:
                joined[i] = _as_member(member, operands)
        return joined

    def _compute(
        self, x: torch.Tensor, joined: dict[int, GroupMember], release: Any = None
    ) -> tuple[torch.Tensor, ...]:
        first = self.members[next(iter(joined))]
        name, invariant = type(first).__name__, first.batch_invariant
        arguments = (name, x, list(joined.values()), invariant, release)
        if first.keep_dense and not torch.compiler.is_compiling():
            with requested():
                return qlora_group_of(*arguments)
        return qlora_group_of(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no pending outputs: those belong to a graph."""
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members = state["members"]
        self.clear()


def _joining(member: QuantizedLinear, x: torch.Tensor) -> WeightOperands | None:
    """The member's operands if it can be computed in a group for x."""
    adapter = isinstance(member, QLoRALinear)
    if adapter and member.merged is not None:
        return None
    held = member._parameters
    if member.weight.device != x.device or (adapter and held["lora_a"].device != x.device):
        return None
    # Not a tensor that is sharded, or otherwise not what it seems.
    if any(p is not None and type(p) not in (nn.Parameter, torch.Tensor) for p in held.values()):
        return None
    operands = member.operands()
    return operands if isinstance(operands, WeightOperands) else None


def _as_member(member: QuantizedLinear, operands: WeightOperands) -> GroupMember:
    if not isinstance(member, QLoRALinear):
        return GroupMember(operands, None, None, 1.0, member.bias, 0.0, None)
    dropout_p = member.dropout_p if member.training else 0.0
    return GroupMember(
        operands, member.lora_a, member.lora_b, member.scaling, member.bias, dropout_p, None
    )


def _state(member: QuantizedLinear) -> tuple[Any, ...] | None:
    """Everything of a member that its output depends on; None where that cannot be told."""
    held = [p for p in member._parameters.values() if p is not None]
    if any(p.is_inference() for p in held):
        return None
    state: tuple[Any, ...] = (
        member.batch_invariant,
        *((id(p), p.data_ptr(), p._version, p.requires_grad) for p in held),
    )
    if isinstance(member, QLoRALinear):
        dropout_p = member.dropout_p if member.training else 0.0
        state += (member.scaling, dropout_p, member.merged is None)
    return state


def _surroundings(x: torch.Tensor) -> tuple[Any, ...]:
    """What else decides how x is computed with, and whether that can be handed on."""
    device_type = x.device.type
    return (
        x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        threading.get_ident(),
    )
