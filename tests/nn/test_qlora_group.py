"""QLoRAGroup: layers computed together give what they give apart."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qlora_kernels as qlk
from qlora_kernels.errors import ArgumentError, ArgumentTypeError
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.group_checks import CPU, check_grouped_model
from tests.nn.groups import NAMES, Attention, K, attention, layer, packed, step, tokens
from tests.problems import DTYPES


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_group_is_its_layers(
    backend: str, dtype: torch.dtype, dropout: float, computed: list[int]
) -> None:
    model, x = attention(dropout), tokens(dtype)
    with qlk.backend(backend):
        apart = step(model, model, x)
        qlk.group_projections(model)
        together = step(model, model, x)
        explicit = step(model.q_proj.group, model, x)
        qlk.ungroup_projections(model)
        again = step(model, model, x)
    assert computed == [3, 3]
    for wanted, *got in zip(apart, together, explicit, again, strict=True):
        for each in got:
            assert_bitwise_equal(each, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_grouped_model_is_as_accurate(dtype: torch.dtype, dropout: float) -> None:
    for tokens_each in (8, 70):
        check_grouped_model(CPU, attention(dropout), dtype, tokens_each)


def test_x_is_saved_once() -> None:
    model, x = attention(), tokens()
    rows = x.numel() // K

    def saved_of(call: Callable[[Tensor], Any]) -> tuple[int, int]:
        """Copies of x that are saved, and bytes beside what the layers hold."""
        held = {p.data_ptr() for p in model.parameters()}
        with packed() as kept:
            call(x)
        beyond = [t for t in kept if t.data_ptr() not in held]
        copies = sum(t.shape[-1] == K and t.numel() == x.numel() for t in beyond)
        return copies, sum(t.numel() * t.element_size() for t in beyond)

    model.k_proj = layer(32, 3)
    xa = rows * (4 + 3 + 7) * 4
    assert saved_of(model) == (3, 3 * x.numel() * 4 + xa)
    qlk.group_projections(model)
    assert saved_of(model) == (1, x.numel() * 4 + xa)
    assert saved_of(model.q_proj.group) == (1, x.numel() * 4 + xa)


def test_autocast_casts_x_once() -> None:
    model, x = attention(), tokens()
    copies = []
    for grouped in (False, True):
        if grouped:
            qlk.group_projections(model)
        with packed() as kept, torch.autocast("cpu", torch.bfloat16):
            ys = model(x)
        assert all(y.dtype == torch.bfloat16 for y in ys)
        casts = {t.data_ptr() for t in kept if t.dtype == torch.bfloat16 and t.shape[-1] == K}
        copies.append(len(casts))
    assert copies == [2, 1], "q and v save what they cast, k saves no x"
    results = []
    for grouped in (True, False):
        if not grouped:
            qlk.ungroup_projections(model)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, model, x))
    # Gradients of x are summed before they are widened.
    for got, wanted in zip(*results, strict=True):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpointing(use_reentrant: bool, dropout: float) -> None:
    model, x = attention(dropout), tokens()
    apart = step(model, model, x)
    qlk.group_projections(model)

    def checkpointed(x: Tensor) -> tuple[Tensor, ...]:
        ys: tuple[Tensor, ...] = checkpoint(model, x, use_reentrant=use_reentrant)
        return ys

    for got, wanted in zip(step(checkpointed, model, x), apart, strict=True):
        assert_bitwise_equal(got, wanted)
    assert model.q_proj.group._pending is None or not model.q_proj.group._pending.outputs


def test_state_dicts_and_adapters_know_nothing_of_groups(tmp_path: Any) -> None:
    model = attention()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    qlk.save_adapter(model, tmp_path / "apart")
    qlk.group_projections(model)
    assert list(model.state_dict()) == list(before)
    assert [name for name, _ in model.named_modules()] == modules
    qlk.save_adapter(model, tmp_path / "together")
    for file in (tmp_path / "apart").iterdir():
        assert (tmp_path / "together" / file.name).read_bytes() == file.read_bytes()
    model.load_state_dict(before)
    qlk.load_adapter(model, tmp_path / "apart")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_groups_of_their_own(how: str, computed: list[int]) -> None:
    model, x = attention(), tokens()
    qlk.group_projections(model)
    model.q_proj(x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    group = other.q_proj.group
    assert group is not model.q_proj.group
    assert list(group.members) == [other.q_proj, other.k_proj, other.v_proj]
    with torch.no_grad():
        other.v_proj.lora_b.zero_()
    computed.clear()
    for name, got in zip(NAMES, other(x), strict=True):
        assert_bitwise_equal(got.detach(), getattr(other, name).compute(x).detach())
    assert computed == [3]


@pytest.mark.parametrize("explicit", [False, True])
def test_fullgraph_compile(explicit: bool) -> None:
    torch._dynamo.reset()
    model, x = attention(), tokens()
    apart = step(model, model, x)
    qlk.group_projections(model)
    call = model.q_proj.group.__call__ if explicit else model.__call__
    compiled = torch.compile(lambda x: call(x), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(step(compiled, model, x), apart, strict=True):
        assert_bitwise_equal(got, wanted)
    assert model.q_proj.group._pending is None


def test_inference_mode() -> None:
    model, x = attention(), tokens()
    qlk.group_projections(model)
    apart = [getattr(model, name).compute(x).detach() for name in NAMES]
    with torch.inference_mode():
        for inside in (x.detach(), x.detach().clone()):
            for got, wanted in zip(model(inside), apart, strict=True):
                assert_bitwise_equal(got, wanted)


def test_members_that_cannot_join_compute_on_their_own(computed: list[int]) -> None:
    torch.manual_seed(0)
    model = Attention(
        q_proj=layer(32),
        k_proj=layer(32, block_size=32),
        v_proj=layer(32, batch_invariant=True),
    )
    qlk.group_projections(model)
    x = tokens()
    for call in (model, model.q_proj.group):
        for name, got in zip(NAMES, call(x), strict=True):
            assert_bitwise_equal(got.detach(), getattr(model, name).compute(x).detach())
    assert not computed


def test_gradients_that_nobody_wants_are_not_made() -> None:
    model, x = attention(), tokens().detach()
    model.q_proj.lora_a.requires_grad_(False)
    qlk.group_projections(model)
    model(x)[2].sum().backward()
    assert model.q_proj.lora_b.grad is not None and not model.q_proj.lora_b.grad.any()
    assert model.q_proj.lora_a.grad is None and model.v_proj.lora_a.grad is not None
    for parameter in qlk.lora_parameters(model):
        parameter.requires_grad_(False)
    assert not any(y.requires_grad for y in model(x))


def test_a_trained_bias_gets_its_gradient() -> None:
    model, x = attention(), tokens()
    model.k_proj.bias.requires_grad_()
    qlk.group_projections(model)
    sum(y.sum() for y in model(x)).backward()
    wanted = torch.full((32,), 10.0)
    assert torch.equal(model.k_proj.bias.grad, wanted) and model.q_proj.bias.grad is None


def test_a_tied_layer_gets_the_sum_of_its_gradients() -> None:
    model, x = attention(), tokens()
    model.v_proj = layer(32, 4)
    model.v_proj.lora_a = model.q_proj.lora_a
    apart = step(model, model, x)
    qlk.group_projections(model)
    for got, wanted in zip(step(model, model, x), apart, strict=True):
        torch.testing.assert_close(got, wanted)


def test_what_is_no_group_is_refused() -> None:
    model = attention()
    with pytest.raises(ArgumentTypeError, match="members must be QLoRALinear or QuantizedLinear"):
        qlk.QLoRAGroup([model.q_proj, nn.Linear(K, 3)])
    for members in ([model.q_proj], [model.q_proj, model.q_proj]):
        with pytest.raises(ArgumentError, match="members must be two or more different layers"):
            qlk.QLoRAGroup(members)
    wide = qlk.QuantizedLinear.from_linear(nn.Linear(2 * K, 3))
    with pytest.raises(ArgumentError, match=r"members must be of one in_features, got \[64, 128\]"):
        qlk.QLoRAGroup([model.q_proj, wide])
    qlk.QLoRAGroup([model.q_proj, model.k_proj]).attach()
    with pytest.raises(ArgumentError, match="members must be in no other group"):
        qlk.QLoRAGroup([model.q_proj, model.v_proj]).attach()
    with pytest.raises(ArgumentError, match=r"QLoRALinear: x must be \[\.\.\., 64\]"):
        model.q_proj(torch.randn(3, 5))


def test_group_projections_reports_what_it_did() -> None:
    model = nn.ModuleDict(
        {
            "one": attention(),
            "two": Attention(q_proj=layer(32), k_proj=nn.Linear(K, 3), v_proj=layer(32)),
            "three": Attention(q_proj=nn.Linear(K, 3), k_proj=layer(32)),
        }
    )
    report = qlk.group_projections(model)
    assert report.grouped == {"one": NAMES, "two": ("q_proj", "v_proj")}
    assert report.skipped == {
        "two.k_proj": "it is a Linear",
        "three.q_proj": "it is a Linear",
        "three.k_proj": "no other layer to group it with",
    }
    assert "2 groups, 3 layers skipped" in str(report)
    assert set(qlk.group_projections(model).skipped.values()) >= {"already in a group"}
    qlk.ungroup_projections(model)
    assert all(getattr(m, "group", None) is None for m in model.modules())
    own = qlk.group_projections(model, [("v_proj", "q_proj")])
    assert own.grouped["one"] == ("v_proj", "q_proj")
    with pytest.raises(ArgumentError, match="group_projections: model must be a model in which"):
        qlk.group_projections(nn.Sequential(layer(32), layer(32)))
