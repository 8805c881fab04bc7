"""group_projections: find the layers of a model that share an input, and group them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from qlora_kernels.errors import argument_error
from qlora_kernels.nn.qlora_group import QLoRAGroup
from qlora_kernels.nn.quantized_linear import QuantizedLinear

# Names of layers that Llama and its relatives give one input.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class GroupReport:
    """What `group_projections` did.

    Attributes:
        grouped: name of the module that holds them -> names of the layers grouped there; two groups
            of a module have one entry each, "name", "name (2)".
        skipped: name of a layer that was left alone -> why.
    """

    grouped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.grouped)} groups, {len(self.skipped)} layers skipped"]
        lines += [f"  {name}: {', '.join(layers)}" for name, layers in self.grouped.items()]
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def group_projections(
    model: nn.Module, names: Sequence[Sequence[str]] = PROJECTIONS
) -> GroupReport:
    """Compute layers that share an input together, in place; see `QLoRAGroup`.

    Nothing that is stored changes, and `ungroup_projections` undoes it. A second call leaves the
    groups there are.

    Args:
        model: with `QLoRALinear` or `QuantizedLinear` layers, as `replace_linear` leaves it.
        names: groups of attribute names; a module that holds two or more layers of a group's names
            has these grouped, in that order.

    Raises:
        ArgumentError: no module holds two such layers.
    """
    report = GroupReport()
    for parent_name, parent in model.named_modules():
        for wanted in names:
            present = {name: parent._modules.get(name) for name in wanted}
            found = {name: layer for name, layer in present.items() if layer is not None}
            if len(found) < 2:
                continue
            members: dict[str, QuantizedLinear] = {}
            for name, layer in found.items():
                full = f"{parent_name}.{name}" if parent_name else name
                reason = _reason_against(layer, list(members.values()))
                if reason is not None:
                    report.skipped[full] = reason
                else:
                    assert isinstance(layer, QuantizedLinear)
                    members[name] = layer
            if len(members) < 2:
                for name in members:
                    full = f"{parent_name}.{name}" if parent_name else name
                    report.skipped[full] = "no other layer to group it with"
                continue
            QLoRAGroup(list(members.values())).attach()
            report.grouped[_key(report, parent_name)] = tuple(members)
    if not report.grouped and "already in a group" not in report.skipped.values():
        rule = f"a model in which some module holds two quantized layers of {list(names)}"
        raise argument_error("group_projections", "model", rule, str(report))
    return report


def ungroup_projections(model: nn.Module) -> None:
    """Let every layer of the model compute on its own again."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.group is not None:
            module.group.detach()


def _key(report: GroupReport, parent: str) -> str:
    name, count = parent, 1
    while name in report.grouped:
        count += 1
        name = f"{parent} ({count})"
    return name


def _reason_against(layer: nn.Module, members: list[QuantizedLinear]) -> str | None:
    if not isinstance(layer, QuantizedLinear):
        return f"it is a {type(layer).__name__}"
    if layer.group is not None:
        return "already in a group"
    if members and layer.in_features != members[0].in_features:
        return f"its in_features is {layer.in_features}, not {members[0].in_features}"
    if any(layer is member for member in members):
        return "it is the same layer as another one"
    return None
