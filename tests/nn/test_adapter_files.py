"""Adapters on disk: the real peft loads ours, we load peft's, and nothing wrong gets in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.errors import ArgumentError, CheckpointError
from qlora_kernels.nn import LoRAAdapter, replace_linear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 48)
        self.v_proj = nn.Linear(32, 48, bias=False)
        self.out = nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(torch.tanh(self.q_proj(x)) * self.v_proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def trained(**options: Any) -> Net:
    """A net whose adapters are not zero; plain LoRA, so that a dense peft model agrees."""
    model = Net()
    replace_linear(model, **({"rank": 4, "alpha": 6.0, "quantize": False} | options))
    for parameter in qlk.lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


X = torch.linspace(-1, 1, 5 * 32).view(5, 32)


def assert_same_function(one: nn.Module, other: nn.Module) -> None:
    """In fp64, where the order of sums does not show."""
    twins = [copy.deepcopy(model).double().eval() for model in (one, other)]
    torch.testing.assert_close(*(twin(X.double()) for twin in twins))


@pytest.mark.parametrize(
    "options",
    [{}, {"rslora": True}, {"target": ["q_proj"]}, {"target": r"layers\.1\.(q_proj|out)"}],
    ids=str,
)
def test_peft_loads_ours(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(**options)
    qlk.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert_same_function(loaded, model)
    ours = sum(isinstance(module, LoRAAdapter) for module in model.modules())
    theirs = [n for n, _ in loaded.named_parameters() if "lora_A" in n]
    assert len(theirs) == ours


def test_peft_loads_layers_of_different_rank_and_alpha(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = Net()
    replace_linear(model, rank=4, alpha=8, quantize=False, target=["v_proj", "out"])
    replace_linear(model, rank=2, alpha=5, quantize=False, rslora=True, target=["layers.0.q_proj"])
    for parameter in qlk.lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    qlk.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert_same_function(loaded, model)
    ours = Net()
    qlk.load_adapter(ours, tmp_path)
    assert_same_function(ours, model)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("base", ["dense", "quantized", "adapted"])
def test_we_load_pefts(base: str, rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "out"],
        use_rslora=rslora,
        rank_pattern={"layers.1.out": 5},
        alpha_pattern={"out": 4},
        lora_dropout=0.1,
    )
    theirs = peft.get_peft_model(Net(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(str(tmp_path))
    model = Net()
    if base == "quantized":
        for block in model.layers:
            block.q_proj = qlk.QuantizedLinear.from_linear(block.q_proj)
    elif base == "adapted":
        replace_linear(model, rank=2, quantize=False, target=["q_proj", "out"])
    qlk.load_adapter(model, tmp_path)
    model.eval()
    assert model.layers[1].out.rank == 5 and model.layers[0].q_proj.dropout_p == 0.1
    if base != "quantized":
        assert_same_function(model, theirs)
        return
    assert type(model.layers[0].q_proj) is qlk.QLoRALinear
    layer = model.layers[0].q_proj
    delta = layer.scaling * (layer.lora_b.double() @ layer.lora_a.double())
    peft_layer = theirs.double().base_model.model.layers[0].q_proj
    torch.testing.assert_close(delta, peft_layer.get_delta_weight("default"))


def test_our_own_round_trip_is_exact(tmp_path: Path) -> None:
    model = trained(quantize=True)
    qlk.save_adapter(model, tmp_path / "deep" / "folder", base_model_name="tiny")
    config = json.loads((tmp_path / "deep" / "folder" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny" and config["r"] == 4
    other = Net()
    replace_linear(other, rank=4, alpha=6.0)
    qlk.load_adapter(other, tmp_path / "deep" / "folder")
    assert torch.equal(other.eval()(X), model(X))


def test_saving_over_an_adapter_leaves_no_other_files(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        qlk.save_adapter(trained(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_model_without_adapters_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="model must be one with LoRA layers"):
        qlk.save_adapter(Net(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, rename: dict[str, str | None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {rename.get(key, key): value for key, value in load_file(path).items()}
    save_file({key: value for key, value in tensors.items() if key}, path)


A0 = "base_model.model.layers.0.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "must be JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "configuration of a LoRA"),
        (lambda f: edit_config(f, peft_type="LOHA"), "configuration of a LoRA"),
        (lambda f: edit_config(f, use_dora=True), "use_dora must be False, got True"),
        (lambda f: edit_config(f, modules_to_save=["lm_head"]), "modules_to_save must be None"),
        (lambda f: edit_config(f, bias="all"), "bias must be 'none', got 'all'"),
        (lambda f: edit_config(f, r="4"), "must hold r and lora_alpha"),
        (lambda f: edit_config(f, r=5), r"lora_a of layers\.0\.q_proj must be \[5, 32\]"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"no"), "truncated or foreign"),
        (lambda f: edit_weights(f, {A0: None}), "must hold A and B"),
        (lambda f: edit_weights(f, {A0: "other.weight"}), "LoRA weights of linear layers only"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(
    spoil: Any, message: str, tmp_path: Path
) -> None:
    qlk.save_adapter(trained(), tmp_path)
    spoil(tmp_path)
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        qlk.load_adapter(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    qlk.save_adapter(trained(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or foreign"):
        qlk.load_adapter(trained(), tmp_path)


def test_modules_that_do_not_match_are_named(tmp_path: Path) -> None:
    qlk.save_adapter(trained(target=["q_proj"]), tmp_path)
    with pytest.raises(CheckpointError, match=r"got none for layers\.0\.v_proj"):
        qlk.load_adapter(trained(), tmp_path)
    with pytest.raises(CheckpointError, match=r"got layers\.0\.q_proj, which is no linear layer"):
        qlk.load_adapter(nn.ModuleDict({"layers": nn.ModuleList()}), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_of_a_changed_base_are_refused(start: str, tmp_path: Path) -> None:
    """What they add belongs to what their start left of the base weights."""
    peft = pytest.importorskip("peft")
    base = Net()
    before = base.layers[0].q_proj.weight.detach().clone()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    model = peft.get_peft_model(base, config)
    left = model.base_model.model.layers[0].q_proj.base_layer.weight
    assert not torch.allclose(left, before)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"init_lora_weights must leave .* got '{start}'"):
        qlk.load_adapter(Net(), tmp_path)
