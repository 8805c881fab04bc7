"""from_pretrained and save_pretrained with the quantizer; bitsandbytes checkpoints both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qlora_kernels as qlk
from tests.integrations.models import in_4bit, make, relative_error, saved, tokens, transformers

peft = pytest.importorskip("peft", reason="in the hf extra")
Auto = transformers.AutoModelForCausalLM


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """intermediate_size 160: blocks straddle the rows of down_proj."""
    return saved(make("llama", intermediate_size=160), tmp_path_factory.mktemp("llama"))


def config(**options: Any) -> Any:
    return qlk.QLoRAKernelsConfig(**options)


def quantized_layers(model: nn.Module) -> dict[str, qlk.QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, qlk.QuantizedLinear)}


def same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoint folders hold the same tensors, byte for byte."""
    a, b = (
        {k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()}
        for p in (one, other)
    )
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8))
        for k in a
    )


@pytest.mark.parametrize("format", qlk.list_formats())
def test_on_the_fly_then_saved_loaded_and_saved_again(
    llama: str, format: str, tmp_path: Path
) -> None:
    model = Auto.from_pretrained(llama, quantization_config=config(format=format))
    dense = Auto.from_pretrained(llama)
    layers = quantized_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        wanted = qlk.quantize(dense.get_submodule(name).weight, format)
        assert torch.equal(layer.quantized_weight.codes, wanted.codes)
        assert torch.equal(layer.dequantize(), qlk.dequantize(wanted))
    logits = model(tokens()).logits
    model.save_pretrained(tmp_path / "one", max_shard_size="40KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    again, info = Auto.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(tokens()).logits, logits)
    again.save_pretrained(tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("options", [{"block_size": 128}, {"double_quant": False}])
def test_options_reach_the_layers_and_the_file(
    llama: str, options: dict[str, Any], tmp_path: Path
) -> None:
    chosen = config(skip=["k_proj"], **options)
    model = Auto.from_pretrained(llama, quantization_config=chosen)
    layers = quantized_layers(model)
    assert len(layers) == 12 and not any("k_proj" in name for name in layers)
    fmt = qlk.get_format("nf4").override(**options)
    assert all(layer.format == fmt for layer in layers.values())
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "qlora_kernels"
    assert (stored["block_size"], stored["double_quant"]) == (fmt.block_size, fmt.double_quant)
    again = Auto.from_pretrained(tmp_path)
    assert quantized_layers(again).keys() == layers.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_model(llama: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Auto.from_pretrained(llama, quantization_config=config(), dtype=dtype)
    assert {layer.weight_dtype for layer in quantized_layers(model).values()} == {dtype}
    model.save_pretrained(tmp_path)
    again = Auto.from_pretrained(tmp_path)
    assert {layer.weight_dtype for layer in quantized_layers(again).values()} == {dtype}
    # The scales are bits, which a change of dtype leaves alone.
    wide = Auto.from_pretrained(tmp_path, dtype=torch.float32)
    for name, layer in quantized_layers(wide).items():
        other = model.get_submodule(name)
        assert torch.equal(layer.dequantize(torch.float32), other.dequantize(torch.float32))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", None])
def test_device_maps(llama: str, device_map: Any) -> None:
    model = Auto.from_pretrained(llama, quantization_config=config(), device_map=device_map)
    wanted = Auto.from_pretrained(llama, quantization_config=config())
    assert torch.equal(model(tokens()).logits, wanted(tokens()).logits)


def test_disk_offload_is_refused(llama: str) -> None:
    with pytest.raises(qlk.errors.ArgumentError, match="without disk"):
        Auto.from_pretrained(
            llama, quantization_config=config(), device_map={"model": "cpu", "lm_head": "disk"}
        )


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gpt2", "t5", "bert"])
def test_families(name: str, tmp_path: Path) -> None:
    """GPT-2 stores its weights transposed and ties lm_head; T5 keeps `wo` in fp32; BERT has no
    head; Qwen2 has biases."""
    dense = make(name, **({"tie_word_embeddings": True} if name == "qwen2" else {}))
    path = saved(dense, tmp_path)
    cls = type(dense)
    model = cls.from_pretrained(path, quantization_config=config(), dtype=torch.float32).eval()
    layers = quantized_layers(model)
    assert layers
    for layer_name, layer in layers.items():
        weight = dense.get_submodule(layer_name).weight
        weight = weight.T if name == "gpt2" else weight
        assert torch.equal(layer.dequantize(), qlk.dequantize(qlk.quantize(weight)))
    if name == "t5":
        assert not any(layer_name.endswith(".wo") for layer_name in layers)
    if name in ("gpt2", "qwen2"):
        assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = tokens()
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}
    got = model(**given)[0]
    # Every quantized layer, dequantized, is the model to compare with.
    wanted = model.dequantize()(**given)[0]
    assert not quantized_layers(model)
    assert relative_error(got, wanted) < 1e-5
    loaded = cls.from_pretrained(path, quantization_config=config(), dtype=torch.float32).eval()
    loaded.save_pretrained(tmp_path / "q")
    again = cls.from_pretrained(tmp_path / "q").eval()
    assert torch.equal(again(**given)[0], got)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_checkpoints_both_ways(
    llama: str, quant_type: str, nested: bool, storage: torch.dtype, tmp_path: Path
) -> None:
    stock = in_4bit(
        llama,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
    )
    stock.save_pretrained(tmp_path / "stock")
    path = str(tmp_path / "stock")
    ours = Auto.from_pretrained(path, config=qlk.QLoRAKernelsConfig.adopt(path))
    assert len(quantized_layers(ours)) == 14
    # bitsandbytes on the same kernels, to the bit. (Stock, it is wrong where blocks straddle rows.)
    qlk.patch_bitsandbytes()
    try:
        assert torch.equal(ours(tokens()).logits, stock(tokens()).logits)
    finally:
        qlk.unpatch_bitsandbytes()
    ours.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path / "stock", tmp_path / "again")
    configs = [
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("stock", "again")
    ]
    assert configs[0] == configs[1]
    reread = Auto.from_pretrained(tmp_path / "again")
    assert type(reread.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    qlk.accelerate(reread, verbose=False)
    assert torch.equal(reread(tokens()).logits, ours(tokens()).logits)
    reread.save_pretrained(tmp_path / "third")  # which stock transformers does not manage
    assert same_files(tmp_path / "stock", tmp_path / "third")


def test_a_model_quantized_here_is_written_for_bitsandbytes(llama: str, tmp_path: Path) -> None:
    model = Auto.from_pretrained(llama, quantization_config=config(checkpoint="bitsandbytes"))
    model.save_pretrained(tmp_path)
    reread = Auto.from_pretrained(tmp_path)
    qlk.accelerate(reread, verbose=False)
    assert torch.equal(reread(tokens()).logits, model(tokens()).logits)


def test_what_is_refused(llama: str, tmp_path: Path) -> None:
    with pytest.raises(qlk.errors.ArgumentError, match="get_format: name must be one of"):
        config(format="nf5")
    with pytest.raises(qlk.errors.ArgumentError, match="nf4 or fp4 for bitsandbytes"):
        config(format="int4", checkpoint="bitsandbytes")
    with pytest.raises(qlk.errors.ArgumentError, match="checkpoint must be one of"):
        config(checkpoint="gguf")
    with pytest.raises(qlk.errors.ArgumentError, match=r"known ones, got load_in_4bit"):
        config(load_in_4bit=True)
    with pytest.raises(qlk.errors.CheckpointError, match="not a quantized checkpoint"):
        qlk.QLoRAKernelsConfig.adopt(llama)
    with pytest.raises(qlk.errors.CheckpointError, match="4-bit checkpoint"):
        qlk.QLoRAKernelsConfig.from_bitsandbytes({"load_in_8bit": True})


def test_a_checkpoint_of_another_codebook_is_refused(llama: str, tmp_path: Path) -> None:
    model = Auto.from_pretrained(llama, quantization_config=config(format="nf4"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["quantization_config"]["format"] = "int4"
    path.write_text(json.dumps(fields))
    with pytest.raises(qlk.errors.CheckpointError, match="not the table of format 'int4'"):
        Auto.from_pretrained(tmp_path)


def test_footprint_is_four_bits(llama: str) -> None:
    model = Auto.from_pretrained(llama, quantization_config=config())
    for layer in quantized_layers(model).values():
        # 4 bits, 8 bits a scale, and per layer one offset and at least one second-level scale.
        weight = layer.quantized_weight
        bits = weight.bits_per_parameter
        assert bits <= 4 + 8 / 64 + 8 * 8 / weight.numel + 32 / (64 * 256) + 32 / weight.numel
