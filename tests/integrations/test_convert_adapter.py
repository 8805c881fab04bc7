"""convert --adapter: what the merge of PEFT itself makes of the same adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kernels.errors import CheckpointError
from qlora_kernels.integrations import convert as module
from qlora_kernels.integrations.convert import convert_checkpoint
from tests.integrations.models import make, saved, transformers, worst_error

peft = pytest.importorskip("peft", reason="in the hf extra")
Auto = transformers.AutoModelForCausalLM
Tensors = dict[str, torch.Tensor]


def convert(source: Any, target: Path, **options: Any) -> Path:
    return convert_checkpoint(source, target, progress=False, **options)


def tensors(folder: Any) -> Tensors:
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(got: Tensors, wanted: Tensors) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)


def adapter_over(source: str, folder: Path, **options: Any) -> tuple[Any, Path]:
    """A model with a random adapter, which is saved."""
    torch.manual_seed(2)
    chosen = {"r": 4, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False, **options}
    model = peft.get_peft_model(Auto.from_pretrained(source), peft.LoraConfig(**chosen))
    model.save_pretrained(folder)
    return model, folder


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Stacks [experts, N, K]; [experts, K, N] that say so, with biases; [experts, K, N] that do not.
KINDS = ["mixtral", "qwen2_moe", "gpt_oss", "llama4"]


@pytest.mark.parametrize("name", KINDS)
def test_experts_are_merged_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    dense = saved(make(name), tmp_path)
    model, adapter = adapter_over(
        dense,
        tmp_path / "adapter",
        target_parameters=EXPERTS,
        rank_pattern={r".*layers\.1\..*down_proj": 2},
        use_rslora=True,
    )
    model.merge_and_unload().save_pretrained(tmp_path / "wanted")
    merged = convert(dense, tmp_path / "got", to="dense", dtype=torch.float32, adapter=adapter)
    got, wanted = tensors(merged), tensors(tmp_path / "wanted")
    assert worst_error(got, wanted) < 2e-7
    before = tensors(dense)
    assert any(".experts." in n and not torch.equal(got[n], before[n]) for n in before)
    # Quantized in one go, or in two.
    wanted = tensors(convert(merged, tmp_path / "two"))
    assert same(tensors(convert(dense, tmp_path / "one", adapter=adapter)), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_quantized_experts_are_quantized_anew(name: str, tmp_path: Path) -> None:
    ours = convert(saved(make(name), tmp_path), tmp_path / "ours")
    model, adapter = adapter_over(str(ours), tmp_path / "adapter", target_parameters=EXPERTS[1:])
    model.merge_adapter()
    model.unload().save_pretrained(tmp_path / "wanted")
    got = tensors(convert(ours, tmp_path / "got", adapter=adapter))
    wanted, before = tensors(tmp_path / "wanted"), tensors(ours)
    assert same(got, wanted)
    changed = {n for n in before if not torch.equal(before[n], got[n])}
    assert changed and all("down_proj" in n or "q_proj" in n or "o_proj" in n for n in changed)
    # Dense, it is the sum without the rounding to 4 bits.
    model = Auto.from_pretrained(ours).dequantize()
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(
        tmp_path / "plain"
    )
    plain = convert(ours, tmp_path / "sum", to="dense", dtype=torch.float32, adapter=adapter)
    assert worst_error(tensors(plain), tensors(tmp_path / "plain")) < 2e-7


def test_dense_experts_beside_bitsandbytes_layers(tmp_path: Path) -> None:
    """Its files have them dense, and so has the result of either kind."""
    dense = saved(make("mixtral"), tmp_path)
    _, adapter = adapter_over(dense, tmp_path / "adapter", target_parameters=EXPERTS)
    merged = convert(dense, tmp_path / "merged", to="dense", dtype=torch.float32, adapter=adapter)
    direct = convert(dense, tmp_path / "direct", to="bitsandbytes", adapter=adapter)
    assert same(tensors(direct), tensors(convert(merged, tmp_path / "two", to="bitsandbytes")))
    stock = convert(dense, tmp_path / "stock", to="bitsandbytes")
    got = tensors(convert(stock, tmp_path / "got", adapter=adapter))
    experts = [name for name in tensors(dense) if ".experts." in name]
    assert len(experts) == 24
    assert all(torch.equal(got[name], tensors(merged)[name]) for name in experts)
    assert "model.layers.0.self_attn.q_proj.weight_scale_codes" in got


def test_an_adapter_of_single_experts(tmp_path: Path) -> None:
    """As they were made before transformers stacked experts."""
    dense = saved(make("mixtral"), tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w2"
    _, adapter = adapter_over(dense, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    a, b = torch.randn(4, 128), torch.randn(64, 4)
    key = f"base_model.model.{name}.lora_"
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, file, {"format": "pt"})
    merged = convert(dense, tmp_path / "merged", to="dense", dtype=torch.float32, adapter=adapter)
    wanted = tensors(dense)
    wanted[f"{name}.weight"] += 2 * (b @ a)
    assert worst_error(tensors(merged), wanted) < 2e-7
    two = tensors(convert(merged, tmp_path / "two"))
    assert same(tensors(convert(dense, tmp_path / "one", adapter=adapter)), two)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True},
        {"target_modules": [], "target_parameters": ["attn.c_proj.weight", "c_fc.weight"]},
    ],
)
def test_transposed_layers(options: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2's, a square one among them, which takes any orientation without complaint."""
    dense = saved(make("gpt2"), tmp_path)
    model, adapter = adapter_over(dense, tmp_path / "adapter", **options)
    model.merge_and_unload().save_pretrained(tmp_path / "wanted")
    wanted = tensors(tmp_path / "wanted")
    merged = convert(dense, tmp_path / "got", to="dense", dtype=torch.float32, adapter=adapter)
    assert worst_error(tensors(merged), wanted) < 2e-7
    one, two = tmp_path / "one", tmp_path / "two"
    assert same(tensors(convert(dense, one, adapter=adapter)), tensors(convert(merged, two)))
    # Left dense by the checkpoint, it is merged all the same.
    ours = convert(dense, tmp_path / "ours", skip=["attn.c_proj"])
    got = tensors(convert(ours, tmp_path / "some", adapter=adapter))
    name = "transformer.h.1.attn.c_proj.weight"
    assert worst_error({name: got[name]}, {name: wanted[name]}) < 2e-7


def test_a_body_and_its_adapter(tmp_path: Path) -> None:
    """Names with the body's prefix and without are the same layers."""
    path = saved(make("bert"), tmp_path)
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=False)
    whole = transformers.BertForSequenceClassification.from_pretrained(path)
    model = peft.get_peft_model(whole, config)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    merged = convert(path, tmp_path / "got", to="dense", dtype=torch.float32, adapter=file.parent)
    model.merge_and_unload().bert.save_pretrained(tmp_path / "wanted")
    assert worst_error(tensors(merged), tensors(tmp_path / "wanted")) < 2e-7


def test_an_interruption_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = saved(make("mixtral"), tmp_path)
    _, adapter = adapter_over(dense, tmp_path / "adapter", target_parameters=EXPERTS)
    options = {"to": "dense", "adapter": adapter, "shard_bytes": 100_000}
    write, saves = module.save_tensors, list[Path]()

    def interrupted(path: Path, *rest: Any) -> None:
        if len(saves) == 2:
            raise KeyboardInterrupt
        saves.append(path)
        write(path, *rest)

    monkeypatch.setattr(module, "save_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "parts", **options)
    assert not (tmp_path / "parts").exists()
    monkeypatch.undo()
    parts = convert(dense, tmp_path / "parts", **options)
    whole = convert(dense, tmp_path / "whole", to="dense", adapter=adapter)
    assert same(tensors(parts), tensors(whole))
    assert len(list(parts.glob("*.safetensors"))) > 3


def test_what_does_not_fit_is_named_before_anything_is_written(tmp_path: Path) -> None:
    dense = saved(make("mixtral"), tmp_path)
    _, adapter = adapter_over(dense, tmp_path / "adapter", target_parameters=EXPERTS)
    file, settings = (
        adapter / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    held, config = load_file(file), json.loads(settings.read_text())
    experts = "base_model.model.model.layers.1.mlp.experts"

    def refused(pattern: str) -> None:
        with pytest.raises(CheckpointError, match=f"^convert: .*{pattern}"):
            convert(dense, tmp_path / "out", adapter=adapter)
        assert not list(tmp_path.glob("out*"))

    def write(changes: dict[str, Any]) -> None:
        given = {name: t for name, t in (held | changes).items() if t is not None}
        save_file(given, file, {"format": "pt"})

    narrow = {f"{experts}.lora_B.weight": torch.zeros(64, 12)}
    write(narrow)
    refused(r"lora_b of model\.layers\.1\.mlp\.experts\.down_proj must be \[64, 16\], got \[64, 12")
    write({f"{experts}.base_layer.lora_{which}.weight": None for which in "AB"})
    refused(r"must hold A and B of model\.layers\.1\.mlp\.experts\.gate_up_proj, got none")
    other = "base_model.model.model.layers.7.self_attn.q_proj.lora_"
    write({f"{other}A.weight": torch.zeros(4, 64), f"{other}B.weight": torch.zeros(64, 4)})
    refused(r"adapts model\.layers\.7\.self_attn\.q_proj, not a layer of SRC")
    write({})
    settings.write_text(json.dumps({**config, "target_parameters": EXPERTS[:1]}))
    refused(r"lora_a of \S*gate_up_proj must be \[16, 64\], got \[16, 128\]")
    settings.write_text(json.dumps({**config, "use_dora": True}))
    refused("use_dora must be False")
