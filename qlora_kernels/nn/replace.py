"""replace_linear: turn a model's linear layers into LoRA layers, in place and one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import WEIGHT_DTYPES
from qlora_kernels.nn.adapter import LoRAAdapter, check_rank
from qlora_kernels.nn.conv1d import as_linear, is_conv1d, is_linear
from qlora_kernels.nn.lora_linear import LoRALinear
from qlora_kernels.nn.qlora_linear import QLoRALinear
from qlora_kernels.nn.quantized_experts import QuantizedExperts
from qlora_kernels.nn.quantized_linear import QuantizedLinear

_OP = "replace_linear"


@dataclass
class ReplaceReport:
    """What `replace_linear` did.

    Attributes:
        replaced: module name -> class it became.
        skipped: name of a linear layer that was left alone -> why.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} linear layers replaced, {len(self.skipped)} skipped"]
        lines += [f"  {name} -> {became}" for name, became in self.replaced.items()]
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def replace_linear(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    target: str | Sequence[str] = "all-linear",
    skip: Sequence[str] = ("lm_head",),
    quantize: bool = True,
    format: str | Format | Mapping[str, str | Format] = "nf4",
    block_size: int | None = None,
    double_quant: bool | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    batch_invariant: bool = False,
) -> ReplaceReport:
    """Replace linear layers by `QLoRALinear` (or `LoRALinear`) and freeze their weights.

    transformers' Conv1D counts as linear. The projections of `QuantizedExperts`, which are named
    `<module>.<projection>`, get an `ExpertAdapter`, without dropout. All is checked first, and then
    the layers are converted one by one, so that at most one dense weight is held beyond what the
    model still has. Other parameters are left as they are.

    Args:
        model: changed in place; must not itself be a linear layer.
        rank, alpha, dropout, rslora: of every adapter.
        target: "all-linear"; another string is a regular expression that a module's whole name
            must match; a sequence holds names, or the ends of names after a dot (as PEFT's
            target_modules).
        skip: names, or ends of names, that are left alone.
        quantize: quantize dense weights; False makes `LoRALinear` over the dense ones.
        format, block_size, double_quant: see `qlora_kernels.quantize`. A layer that is already
            quantized keeps its tensors. Instead of one format, a mapping gives each layer its own,
            by whole name (as `lab sensitivity` finds them).
        batch_invariant: see `quantized_linear`.

    Raises:
        ArgumentError: a target that no linear layer matches, a rank above min(N, K) of a layer, a
            mapping that lacks one, a weight that cannot be quantized. The model is unchanged then,
            except where a weight turns out not to be finite: the layers before it are converted.
    """
    if is_linear(model):
        raise argument_error(
            _OP, "model", "a module that holds linear layers", f"a {type(model).__name__}"
        )
    if not isinstance(model, nn.Module):
        raise type_error(_OP, "model", "an nn.Module", type(model).__name__)
    report = ReplaceReport()
    chosen: dict[str, nn.Linear] = {}
    projections: dict[str, tuple[QuantizedExperts, str]] = {}
    holders, in_fp32 = _holders(model), _kept_in_fp32(model)
    for name, module in _linears(model):
        if not is_targeted(name, target):
            report.skipped[name] = "not a target"
        elif any(name_ends_with(name, end) for end in skip):
            report.skipped[name] = "named in skip"
        elif quantize and in_fp32 is not None and in_fp32.search(name):
            report.skipped[name] = "the model keeps it in fp32, and reads its weight's dtype"
        elif reason := _why_not(module, quantize, holders):
            report.skipped[name] = reason
        else:
            chosen[name] = module
    for name, owner in _projections(model):
        if not is_targeted(name, target):
            report.skipped[name] = "not a target"
        elif any(name_ends_with(name, end) for end in skip):
            report.skipped[name] = "named in skip"
        elif owner[0].adapter(owner[1]) is not None:
            report.skipped[name] = "adapted already"
        else:
            projections[name] = owner
    if not chosen and not projections:
        names = ", ".join(f"{name!r} ({reason})" for name, reason in report.skipped.items())
        got = f"{target!r} for the layers {names}" if names else "a model without linear layers"
        raise argument_error(_OP, "target", "matched by a linear layer", got)
    for name, module in chosen.items():
        sizes = as_linear(module)
        check_rank(f"{_OP}: {name}", rank, sizes.out_features, sizes.in_features)
        if isinstance(format, Mapping) and name not in format:
            raise argument_error(_OP, "format", "a format for every layer", f"none for {name}")
    for name, (experts, projection) in projections.items():
        check_rank(f"{_OP}: {name}", rank, *experts.projections[projection].shape)
    adapter = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora}
    converted: dict[int, nn.Module] = {}  # a module may be held in several places
    for name in list(chosen):
        linear = chosen.pop(name)
        layer: Any = converted.get(id(linear))
        if layer is None:
            if quantize or isinstance(linear, QuantizedLinear):
                layer = QLoRALinear.from_linear(
                    as_linear(linear),
                    format=format[name] if isinstance(format, Mapping) else format,
                    block_size=block_size,
                    double_quant=double_quant,
                    batch_invariant=batch_invariant,
                    **adapter,  # type: ignore[arg-type]
                )
            else:
                layer = LoRALinear.from_linear(as_linear(linear), **adapter)  # type: ignore[arg-type]
            if is_conv1d(linear) or getattr(linear, "source_is_transposed", False):
                layer.source_is_transposed = True
            if any(other is linear for other in chosen.values()):
                converted[id(linear)] = layer
        set_module(model, name, layer)
        report.replaced[name] = type(layer).__name__
    for name, (experts, projection) in projections.items():
        added = experts.add_adapter(projection, rank=rank, alpha=alpha, rslora=rslora)
        report.replaced[name] = type(added).__name__
    return report


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module):
            yield name, module


def _projections(model: nn.Module) -> Iterator[tuple[str, tuple[QuantizedExperts, str]]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for projection in module.projections:
                yield f"{name}.{projection}", (module, projection)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's id."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(name)
    return found


def _kept_in_fp32(model: nn.Module) -> re.Pattern[str] | None:
    """The names of modules that a transformers model keeps in fp32, as T5 its `wo`."""
    kept: set[str] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            kept.update(getattr(module, attribute, None) or ())
    return re.compile(rf"(^|\.)({'|'.join(sorted(kept))})($|\.)") if kept else None


def _why_not(module: nn.Linear, quantize: bool, holders: dict[int, list[str]]) -> str | None:
    """Why a targeted layer is left alone, or None."""
    if isinstance(module, LoRAAdapter):
        return f"already a {type(module).__name__}"
    if isinstance(module, QuantizedLinear):
        return None
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"a {type(module).__name__}, whose owner may not call its forward"
    if quantize and module.weight.dtype not in WEIGHT_DTYPES:
        return f"its weight is {module.weight.dtype}, not float32, float16 or bfloat16"
    if module.weight.is_meta:
        return "its weight is on the meta device"
    tied = holders[id(module.weight)]
    return f"its weight is shared by {' and '.join(tied)}" if len(tied) > 1 else None


def is_targeted(name: str, target: str | Sequence[str]) -> bool:
    """Whether a module's name is meant by `target`; see `replace_linear`."""
    if isinstance(target, str):
        return target == "all-linear" or re.fullmatch(target, name) is not None
    return any(name_ends_with(name, end) for end in target)


def name_ends_with(name: str, end: str) -> bool:
    """Whether `name` is `end`, or ends with it after a dot."""
    return name == end or name.endswith("." + end)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` says."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
