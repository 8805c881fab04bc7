"""convert: the same tensors as from_pretrained and save_pretrained make, a file at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_kernels as qlk
from qlora_kernels import cli
from qlora_kernels.integrations import convert as module
from qlora_kernels.integrations.command import add_options, main
from qlora_kernels.integrations.convert import convert_checkpoint
from tests.integrations.models import in_4bit, make, relative_error, saved, tokens, transformers

Auto = transformers.AutoModelForCausalLM


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def convert(source: Any, target: Path, **options: Any) -> Path:
    return convert_checkpoint(source, target, progress=False, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(make("llama", intermediate_size=160), tmp_path_factory.mktemp("llama"))


CASES = [(name, "nf4") for name in ("llama", "gpt2", "t5", "qwen2", "mixtral", "qwen2_moe")]
CASES += [(name, format) for name in ("llama", "mixtral") for format in ("int4", "any4")]
# One of every other way to be stored.
CASES += [("llama", name) for name in ("any4", "bof3s", "mxfp4")]
CASES += [("mixtral", name) for name in ("kmeans", "int4_asym")]


@pytest.mark.parametrize(("name", "format"), CASES)
def test_quantized_as_from_pretrained_does(name: str, format: str, tmp_path: Path) -> None:
    dense = make(name)
    path = saved(dense.to(torch.bfloat16), tmp_path)
    config = qlk.QLoRAKernelsConfig(format=format)
    model = type(dense).from_pretrained(path, quantization_config=config)
    model.save_pretrained(tmp_path / "wanted")
    convert(path, tmp_path / "got", format=format)
    assert same(tmp_path / "got", tmp_path / "wanted")
    loaded, info = type(dense).from_pretrained(tmp_path / "got", output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.quantization_config.weight_dtype == "bfloat16"
    back = convert(tmp_path / "got", tmp_path / "back", to="dense")
    plain, info = type(dense).from_pretrained(back, output_loading_info=True)
    assert not any(info.values())
    wanted = dict(model.dequantize(torch.bfloat16).named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in plain.named_parameters())
    # As transformers saves it: a mixture's experts one by one.
    assert tensors(back).keys() == tensors(Path(path)).keys()


def test_mixtures_and_bitsandbytes(tmp_path: Path) -> None:
    """Its files hold experts dense; quantized ones are not what it can read."""
    path = saved(make("mixtral"), tmp_path)
    in_4bit(path, bnb_4bit_use_double_quant=False).save_pretrained(tmp_path / "stock")
    direct = convert(path, tmp_path / "direct", to="bitsandbytes", double_quant=False)
    assert same(direct, tmp_path / "stock")
    ours = convert(direct, tmp_path / "ours")
    model = Auto.from_pretrained(ours)
    assert isinstance(model.model.layers[0].self_attn.q_proj, qlk.QuantizedLinear)
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.float32
    assert same(convert(ours, tmp_path / "again", to="bitsandbytes"), direct)
    dense = Auto.from_pretrained(convert(ours, tmp_path / "plain", to="dense", dtype=torch.float32))
    assert relative_error(dense(tokens()).logits, model(tokens()).logits) < 1e-5
    quantized = convert(path, tmp_path / "quantized")
    with pytest.raises(qlk.errors.ArgumentError, match="without quantized experts"):
        convert(quantized, tmp_path / "out", to="bitsandbytes")


def test_experts_that_are_stored_as_one_tensor(tmp_path: Path) -> None:
    """A file may hold what the model does: the 3-D stack itself."""
    model = make("qwen2_moe")
    path = Path(saved(model, tmp_path))
    wanted = convert(path, tmp_path / "wanted")
    held = {n: t for n, t in tensors(path).items() if ".experts." not in n}
    held |= {n: p.data for n, p in model.named_parameters() if ".experts." in n}
    fused = tmp_path / "fused"
    fused.mkdir()
    shutil.copyfile(path / "config.json", fused / "config.json")
    save_file(held, fused / "model.safetensors", {"format": "pt"})
    assert same(convert(fused, tmp_path / "got"), wanted)
    name = "model.layers.1.mlp.experts.down_proj"
    held[name] = held[name][:, :-1].contiguous()
    save_file(held, fused / "model.safetensors", {"format": "pt"})
    with pytest.raises(qlk.errors.CheckpointError, match=f"SRC has {name} as"):
        convert(fused, tmp_path / "out")


def test_bitsandbytes_there_and_back(llama: str, tmp_path: Path) -> None:
    in_4bit(llama).save_pretrained(tmp_path / "stock")
    ours = convert(tmp_path / "stock", tmp_path / "ours")
    model = Auto.from_pretrained(ours)
    assert isinstance(model.model.layers[0].mlp.up_proj, qlk.QuantizedLinear)
    again = convert(ours, tmp_path / "again", to="bitsandbytes")
    assert same(tmp_path / "stock", again)
    stock = Auto.from_pretrained(again)
    qlk.accelerate(stock, verbose=False)
    assert torch.equal(stock(tokens()).logits, model(tokens()).logits)
    dense = convert(tmp_path / "stock", tmp_path / "dense", to="dense", dtype=torch.float32)
    plain = Auto.from_pretrained(dense)(tokens()).logits
    assert relative_error(plain, model(tokens()).logits) < 1e-5
    direct = convert(llama, tmp_path / "direct", to="bitsandbytes", double_quant=True)
    held, wanted = tensors(direct), tensors(tmp_path / "stock")
    assert held.keys() == wanted.keys()
    # The scales' second level is where the two encoders differ; the codes are the same.
    packed = [key for key in wanted if wanted[key].dtype == torch.uint8 and key.endswith(".weight")]
    assert len(packed) == 14 and all(torch.equal(held[key], wanted[key]) for key in packed)


@pytest.mark.parametrize("kind", ["dense", "qlora_kernels", "bitsandbytes"])
def test_adapter_is_merged(kind: str, llama: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="in the hf extra")
    source = llama if kind == "dense" else str(convert(llama, tmp_path / "base", to=kind))
    torch.manual_seed(2)
    model = peft.get_peft_model(
        Auto.from_pretrained(source),
        peft.LoraConfig(
            r=4,
            target_modules="all-linear",
            init_lora_weights=False,
            rank_pattern={"q_proj": 2},
            use_rslora=True,
        ),
    )
    qlk.accelerate(model, verbose=False)
    model.save_pretrained(tmp_path / "adapter")
    merged = convert(
        source, tmp_path / "merged", to="dense", dtype=torch.float32, adapter=tmp_path / "adapter"
    )
    got = Auto.from_pretrained(merged)
    assert type(got.model.layers[0].mlp.up_proj) is nn.Linear
    assert relative_error(got(tokens()).logits, model(input_ids=tokens()).logits) < 2e-5


def test_shards_and_an_interruption(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(llama, tmp_path / "whole")
    saves = []
    write = module.save_tensors

    def interrupted(path: Path, *rest: Any) -> None:
        if len(saves) == 2:
            raise KeyboardInterrupt
        saves.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(module, "save_tensors", interrupted)
    target = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        convert(llama, target, shard_bytes=20_000)
    assert not target.exists()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts.partial").glob("*.safetensors")}
    assert len(kept) == 2
    monkeypatch.setattr(module, "save_tensors", write)
    with pytest.raises(qlk.errors.CheckpointError, match="begun with another shard_bytes"):
        convert(llama, target, shard_bytes=30_000)
    convert(llama, target, shard_bytes=20_000)
    assert not (tmp_path / "parts.partial").exists()
    assert all((target / p.name).stat().st_mtime_ns == at for p, at in kept.items())
    assert same(target, whole)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    held = tensors(target)
    assert index["weight_map"].keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())
    largest = max(p.stat().st_size for p in target.glob("*.safetensors"))
    assert largest < 40_000  # one weight may be above the limit, no two are
    assert torch.equal(
        Auto.from_pretrained(target)(tokens()).logits, Auto.from_pretrained(whole)(tokens()).logits
    )


def test_every_moment_of_a_kill_can_be_gone_on_from(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(llama, tmp_path / "whole")
    assert not (whole / module.SETTINGS).exists()
    # Before its settings are written, and amid that.
    early = tmp_path / "early.partial"
    early.mkdir()
    (early / ".conversion.json.x.tmp").write_text("{")
    assert same(convert(llama, tmp_path / "early"), whole)
    assert not list((tmp_path / "early").glob(".*"))
    # After the folder got its name, before the settings are gone.
    late = tmp_path / "late"
    unlink = Path.unlink

    def killed(path: Path, **options: Any) -> None:
        if path.name == module.SETTINGS:
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(llama, late)
    monkeypatch.undo()
    assert (late / module.SETTINGS).exists()
    with pytest.raises(qlk.errors.ArgumentError, match="DST must be a folder that does not exist"):
        convert(llama, late, format="int4")
    assert same(convert(llama, late), whole)
    assert not (late / module.SETTINGS).exists()


def test_bitsandbytes_gets_embeddings_dense(llama: str, tmp_path: Path) -> None:
    how = qlk.QLoRAKernelsConfig(embeddings=True)
    model = Auto.from_pretrained(llama, quantization_config=how)
    model.save_pretrained(tmp_path / "ours")
    stock = Auto.from_pretrained(convert(tmp_path / "ours", tmp_path / "b", to="bitsandbytes"))
    qlk.accelerate(stock, verbose=False)
    assert torch.equal(stock(tokens()).logits, model(tokens()).logits)


def test_block_sizes_of_bitsandbytes(llama: str, tmp_path: Path) -> None:
    stock = convert(llama, tmp_path / "stock", to="bitsandbytes", block_size=128)
    ours = convert(stock, tmp_path / "ours")
    assert same(ours, convert(llama, tmp_path / "wanted", block_size=128))
    assert Auto.from_pretrained(ours).config.quantization_config.block_size == 128
    assert same(convert(ours, tmp_path / "again", to="bitsandbytes"), stock)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_transposed_experts(name: str, tmp_path: Path) -> None:
    path = saved(make(name), tmp_path)
    model = Auto.from_pretrained(path, quantization_config=qlk.QLoRAKernelsConfig())
    model.save_pretrained(tmp_path / "wanted")
    got = convert(path, tmp_path / "got")
    assert same(got, tmp_path / "wanted")
    back = Auto.from_pretrained(convert(got, tmp_path / "back", to="dense", dtype=torch.float32))
    wanted = dict(model.dequantize().named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in back.named_parameters())


UP = "model.layers.0.mlp.up_proj"


def test_sources_that_do_not_fit_are_named(llama: str, tmp_path: Path) -> None:
    """Before anything is written: the tensor, and the file it is in or should be."""

    def edited(source: Any, name: str, edit: Any) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / name))
        held = tensors(folder)
        edit(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        return folder

    def refused(source: Path, pattern: str, **options: Any) -> None:
        with pytest.raises(qlk.errors.CheckpointError, match=pattern):
            convert(source, tmp_path / "out", **options)
        assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out.*/model*"))
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)

    ours = convert(llama, tmp_path / "ours")
    lacking = edited(llama, "lacking", lambda held: held.pop(f"{UP}.weight"))
    refused(lacking, f"lacking lacks {UP}$")
    refused(lacking, f"lacking lacks {UP}$", to="dense")
    narrow = edited(llama, "narrow", lambda h: h.update({f"{UP}.weight": torch.zeros(3, 64)}))
    refused(narrow, rf"narrow\S*safetensors has {UP}\.weight as \(3, 64\), its config \(160, 64\)")
    for end in ("weight", "weight_scale_absmax"):
        part = edited(ours, f"no {end}", lambda held, end=end: held.pop(f"{UP}.{end}"))
        refused(part, rf"lacks {UP}\.{end}$", to="dense")
    file = Path(shutil.copytree(ours, tmp_path / "foreign")) / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"]["block_size"] = 128
    file.write_text(json.dumps(fields))
    refused(file.parent, r"elements of \S*weight_scale_codes, .* block size 128", to="dense")
    nan = edited(llama, "nan", lambda held: held[f"{UP}.weight"][3, 4].fill_(torch.nan))
    refused(nan, rf"convert: {UP}\.weight in \S*nan/model\.safetensors: .*finite")


def test_what_cannot_be_written_is_named(
    llama: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource", reason="limits on file sizes are POSIX's")
    (tmp_path / "file").write_text("")
    assert cli.main(["convert", llama, str(tmp_path / "file" / "out"), "--quiet"]) == 1
    assert "file/out.partial cannot be written: Not a directory" in capfd.readouterr().err
    target, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert cli.main(["convert", llama, str(target), "--quiet"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    wanted = f"error: convert: {target}.partial/model.safetensors cannot be written: File too large"
    assert wanted in capfd.readouterr().err
    assert cli.main(["convert", llama, str(target), "--quiet"]) == 0
    for size in ("-1", "0", "nan"):
        assert cli.main(["convert", llama, str(target), "--shard-size", size]) == 2
        assert "--shard-size must be" in capfd.readouterr().err


def test_what_is_refused(llama: str, tmp_path: Path) -> None:
    with pytest.raises(qlk.errors.ArgumentError, match="DST must be a folder that does not exist"):
        convert(llama, tmp_path)
    with pytest.raises(qlk.errors.CheckpointError, match=r"config\.json cannot be read"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(qlk.errors.CheckpointError, match=r"adapter_config\.json cannot be read"):
        convert(llama, tmp_path / "out", adapter=llama)
    ours = convert(llama, tmp_path / "ours", format="int4")
    with pytest.raises(qlk.errors.ArgumentError, match="nf4 or fp4 for bitsandbytes"):
        convert(ours, tmp_path / "out", to="bitsandbytes")
    with pytest.raises(qlk.errors.ArgumentError, match="for a dense SRC"):
        convert(ours, tmp_path / "out", format="nf4")
    file = ours / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(qlk.errors.CheckpointError, match="cannot be read"):
        convert(ours, tmp_path / "out", to="dense")


def test_command(llama: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser)
    target = str(tmp_path / "out")
    assert main(parser.parse_args([llama, target, "--no-double-quant"])) == 0
    out, err = capfd.readouterr()
    assert out == f"{target}\n" and "weight" in err
    assert "model.layers.0.mlp.up_proj.weight_absmax" in tensors(Path(target))
    assert main(parser.parse_args([llama, target])) == 2
    assert "error: convert: DST must be" in capfd.readouterr().err
    assert main(parser.parse_args([target + "x", target + "y"])) == 1


def test_command_line(llama: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", llama, str(tmp_path / "out"), "--quiet"]) == 0
    assert capfd.readouterr() == (f"{tmp_path / 'out'}\n", "")
