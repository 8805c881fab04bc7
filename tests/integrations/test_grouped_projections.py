"""A Llama whose projections are grouped: the same logits and gradients, x saved once a group."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.testing.errors import assert_as_accurate, relative_error
from tests.integrations.models import loss_and_gradients, make, tokens

HIDDEN, LAYERS = 64, 2
RANK = 4


def llama(dropout: float = 0.0) -> nn.Module:
    model = make("llama", hidden_size=HIDDEN, num_hidden_layers=LAYERS).train()
    qlk.replace_linear(model, rank=RANK, dropout=dropout)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("lora_a", "lora_b")))
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def test_the_projections_are_found() -> None:
    report = qlk.group_projections(llama())
    assert not report.skipped
    assert report.grouped == {
        f"model.layers.{i}.{parent}": names
        for i in range(LAYERS)
        for parent, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj")),
            ("mlp", ("gate_proj", "up_proj")),
        )
    }


def in_one(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients in one vector, fp64, each in units of its exact norm."""
    return torch.cat([gradients[name].double().flatten() / exact[name].norm() for name in exact])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_logits_and_gradients_are_those_of_separate_layers(
    dropout: float, checkpointing: bool
) -> None:
    model, ids = llama(dropout), tokens()
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    wide = copy.deepcopy(model).double()
    torch.manual_seed(3)
    with qlk.backend("reference"):
        exact_logits, exact = loss_and_gradients(wide, ids)
    results = []
    for grouped in (False, True):
        if grouped:
            qlk.group_projections(model)
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, ids))
    (logits, gradients), (grouped_logits, grouped_gradients) = results
    # torch's GEMM may add in another order where it computes more columns, and the engine sums an
    # x's gradients in another order than the group.
    assert_as_accurate(grouped_logits, exact_logits, logits)
    assert len(gradients) == 2 * 7 * LAYERS
    # All at once: the errors of one gradient come through the layers above it, and are few.
    together, right, apart = (in_one(each, exact) for each in (grouped_gradients, exact, gradients))
    assert relative_error(together, right) <= 2 * relative_error(apart, right)
    for name, module in model.named_modules():
        group = getattr(module, "group", None)
        pending = None if group is None else group._pending
        assert pending is None or not pending.outputs, f"{name} still holds outputs"


def test_bf16_training_follows_the_same_losses() -> None:
    losses = []
    for grouped in (False, True):
        model = llama().to(torch.bfloat16)
        if grouped:
            qlk.group_projections(model)
        optimizer = torch.optim.SGD(qlk.lora_parameters(model), lr=0.5)
        steps = []
        for i in range(4):
            optimizer.zero_grad()
            ids = tokens(seed=i)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[1][0] == losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("autocast", [False, True])
def test_an_input_is_saved_once_a_group(autocast: bool) -> None:
    model, ids = llama(), tokens()
    held = {p.data_ptr() for p in model.parameters()}
    counted = []
    for grouped in (False, True):
        if grouped:
            qlk.group_projections(model)
        packed: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor, packed: list[torch.Tensor] = packed) -> torch.Tensor:
            packed.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids)
        beside = [t for t in packed if t.data_ptr() not in held]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in beside}
        counted.append((sum(t.nbytes for t in beside), sum(storages.values())))
    (packed_apart, stored_apart), (packed_together, stored_together) = counted
    x = ids.numel() * HIDDEN * (2 if autocast else 4)
    # q, k, v and gate, up: three of five copies fewer in each layer.
    assert packed_apart - packed_together == 3 * LAYERS * x
    # Without a cast the separate layers save the same storage, not copies of it.
    assert stored_apart - stored_together == (3 * LAYERS * x if autocast else 0)
