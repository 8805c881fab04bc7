"""Outputs that a group made ahead: handed out while they are right, and never after."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_kernels as qlk
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.nn.groups import NAMES, Attention, K, attention, tokens


def test_merged_and_unmerged_members() -> None:
    model, x = attention(), tokens()
    group = qlk.QLoRAGroup([model.q_proj, model.k_proj, model.v_proj])
    plain = [y.detach() for y in model(x)]
    model.eval()
    model.q_proj.merge()
    merged = model.q_proj(x).detach()
    group.attach()
    for call in (model, group):
        for got, wanted in zip(call(x), (merged, *plain[1:]), strict=True):
            assert_bitwise_equal(got.detach(), wanted)
    # Merged between the calls: what was computed before is not handed out.
    model.q_proj.unmerge()
    model.k_proj(x)
    model.q_proj.merge()
    assert_bitwise_equal(model.q_proj(x).detach(), merged)


MUTATIONS: dict[str, Callable[[Attention, Tensor], Any]] = {
    "x": lambda m, x: x.mul_(2.0),
    "adapter": lambda m, x: m.v_proj.lora_b.add_(0.5),
    "adapter_object": lambda m, x: setattr(m.v_proj, "lora_b", nn.Parameter(m.v_proj.lora_b * 2)),
    "adapter_data": lambda m, x: setattr(m.v_proj.lora_b, "data", m.v_proj.lora_b * 2),
    "alpha": lambda m, x: setattr(m.v_proj, "alpha", 3.0),
    "weight": lambda m, x: m.v_proj.set_quantized_weight(
        qlk.quantize(torch.randn(32, K), double_quant=False)
    ),
    "mode": lambda m, x: m.eval(),
    "trainable": lambda m, x: m.v_proj.lora_a.requires_grad_(False),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", MUTATIONS)
def test_what_changes_between_the_calls_is_seen(change: str, grad: bool) -> None:
    model = attention(dropout=0.5 if change == "mode" else 0.0)
    qlk.group_projections(model)
    x = tokens().detach()
    with torch.set_grad_enabled(grad):
        model.q_proj(x)
        with torch.no_grad():
            MUTATIONS[change](model, x)
        got = model.v_proj(x)
        assert_bitwise_equal(got, model.v_proj.compute(x))
        assert got.requires_grad == model.v_proj.compute(x).requires_grad


def test_surroundings_that_change_between_the_calls_are_seen() -> None:
    model, x = attention(), tokens()
    qlk.group_projections(model)
    with torch.no_grad():
        model.q_proj(x)
    assert model.v_proj(x).requires_grad
    model.q_proj(x)
    with torch.no_grad():
        assert not model.v_proj(x).requires_grad
    model.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.v_proj(x).dtype == torch.bfloat16
    results: list[Tensor] = []
    model.q_proj(x)
    thread = threading.Thread(target=lambda: results.append(model.v_proj(x)))
    thread.start()
    thread.join()
    # Its own graph, which another thread may run while this one runs q's.
    (results[0].sum() + model.q_proj(x).sum()).backward()
    assert_bitwise_equal(results[0].detach(), model.v_proj.compute(x).detach())


def test_another_x_is_computed_on_its_own(computed: list[int]) -> None:
    model, x, other = attention(), tokens(), tokens(seed=2)
    qlk.group_projections(model)
    model.q_proj(x)
    for each in (other, x[:1], x.clone(), x):
        assert_bitwise_equal(model.v_proj(each).detach(), model.v_proj.compute(each).detach())
    # The same object twice is computed twice.
    first, second = model.q_proj(x), model.q_proj(x)
    assert first is not second and torch.equal(first, second)


def test_layers_that_get_other_inputs_are_left_out_in_time(computed: list[int]) -> None:
    model = attention()
    qlk.group_projections(model)
    expected = [3, 3] * 2 + [3, 2]
    for i in range(6):
        # As in cross attention: q looks at one sequence, k and v at another.
        x, other = tokens(seed=2 * i), tokens(seed=2 * i + 1)
        ys = (model.q_proj(x), model.k_proj(other), model.v_proj(other))
        alone = (
            model.q_proj.compute(x),
            model.k_proj.compute(other),
            model.v_proj.compute(other),
        )
        for got, wanted in zip(ys, alone, strict=True):
            assert_bitwise_equal(got.detach(), wanted.detach())
    assert computed[: len(expected) - 2] == expected[:-2]
    assert set(computed[-4:]) == {2}, f"k and v stay a group, q is alone: {computed}"
    model.q_proj.group.clear()
    model(tokens())
    assert computed[-1] == 3


def test_unclaimed_outputs_do_not_stay() -> None:
    model = attention()
    qlk.group_projections(model)
    group = model.q_proj.group

    def unclaimed() -> weakref.ref[Tensor]:
        assert len(group._pending.outputs) == 2
        return weakref.ref(group._pending.outputs[2])

    # Without a graph they go with x.
    x = tokens().detach()
    with torch.no_grad():
        model.q_proj(x)
    output = unclaimed()
    del x
    gc.collect()
    assert output() is None
    # With one they go with its backward, or with the next call.
    model.q_proj(tokens()).sum().backward()
    assert not group._pending.outputs
    group.clear()
    model.q_proj(tokens())
    output = unclaimed()
    model.q_proj(tokens())
    gc.collect()
    assert output() is None
    group.clear()
    model(tokens())
    assert group._pending is None


def test_hooks_of_members_run() -> None:
    model, x = attention(), tokens()
    qlk.group_projections(model)
    seen: list[str] = []
    for name in NAMES:
        getattr(model, name).register_forward_hook(
            lambda module, args, output, name=name: seen.append(name)
        )
    model.v_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    ys = model(x)
    assert seen == list(NAMES)
    assert_bitwise_equal(ys[2].detach(), model.v_proj.compute(x * 2).detach())


def test_a_layer_that_is_no_member_computes_on_its_own() -> None:
    model, x = attention(), tokens()
    qlk.group_projections(model)
    # As torch's replicate() makes one: a shallow copy of the module's dictionary.
    replica = copy.copy(model.q_proj)
    replica.lora_b = nn.Parameter(model.q_proj.lora_b * 2)
    assert replica.group is model.q_proj.group
    assert_bitwise_equal(replica(x).detach(), replica.compute(x).detach())
