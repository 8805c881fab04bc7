"""Checkpoints that lack a task's head, or tensors, or hold what cannot be quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.errors import CheckpointError
from qlora_kernels.integrations.convert import convert_checkpoint
from tests.integrations.models import make, saved, tokens, transformers

Auto = transformers.AutoModelForCausalLM
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The checkpoint of a family's body alone; made once each."""
    made: dict[str, str] = {}

    def checkpoint(name: str) -> str:
        if name not in made:
            model: Any = make(name)
            made[name] = saved(model, tmp_path_factory.mktemp(name))
        return made[name]

    return checkpoint


@pytest.fixture(scope="module")
def stored(
    bodies: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Llama in this library's files and in bitsandbytes'."""
    found = {}
    for kind in ("qlora_kernels", "bitsandbytes"):
        found[kind] = str(tmp_path_factory.mktemp(kind))
        config = qlk.QLoRAKernelsConfig(checkpoint=kind)
        Auto.from_pretrained(bodies("llama"), quantization_config=config).save_pretrained(
            found[kind]
        )
    return found


def edited(source: str, target: Path, edit: Callable[[Tensors], object]) -> str:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    held = load_file(file)
    edit(held)
    save_file(held, file, {"format": "pt"})
    return str(target)


HEADS = [
    ("bert", "SequenceClassification", ["classifier"]),
    ("bert", "MaskedLM", ["cls.predictions.transform.dense"]),
    ("roberta", "SequenceClassification", ["classifier.dense", "classifier.out_proj"]),
    ("distilbert", "SequenceClassification", ["pre_classifier", "classifier"]),
    ("llama", "TokenClassification", ["score"]),
    ("t5", "SequenceClassification", ["classification_head.dense", "classification_head.out_proj"]),
]


@pytest.mark.parametrize("kind", ["qlora_kernels", "bitsandbytes"])
@pytest.mark.parametrize(("family", "task", "heads"), HEADS)
def test_a_head_that_the_checkpoint_lacks_is_made_as_transformers_makes_it(
    family: str,
    task: str,
    heads: list[str],
    kind: str,
    bodies: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cls = getattr(transformers, f"AutoModelFor{task}")
    config = qlk.QLoRAKernelsConfig(checkpoint=kind)
    torch.manual_seed(3)
    model = cls.from_pretrained(bodies(family), quantization_config=config).eval()
    torch.manual_seed(3)
    plain = cls.from_pretrained(bodies(family))
    assert config.skip == []  # what the caller holds is not written to
    assert model.hf_quantizer.left.keys() == set(heads)
    assert f"not quantized: {', '.join(heads)}: the checkpoint lacks it" in caplog.text
    for name in heads:
        head, wanted = model.get_submodule(name), plain.get_submodule(name)
        assert type(head) is nn.Linear and head.weight.requires_grad
        assert torch.equal(head.bias, wanted.bias)
        assert 0.5 < head.weight.std() / wanted.weight.std() < 2
    assert any(isinstance(module, qlk.QuantizedLinear) for module in model.modules())
    model.save_pretrained(tmp_path)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    if kind == "bitsandbytes":
        qlk.accelerate(again, verbose=False)
    ids = tokens()
    ids[:, -1] = 1  # T5's head reads the end of the sequence
    assert torch.equal(again.eval()(ids)[0], model(ids)[0])


def test_a_quantized_body_gets_a_head(bodies: Callable[[str], str], tmp_path: Path) -> None:
    config = qlk.QLoRAKernelsConfig()
    body = transformers.BertModel.from_pretrained(bodies("bert"), quantization_config=config)
    body.save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert type(model.classifier) is nn.Linear
    layer = "encoder.layer.0.output.dense"
    weight = model.bert.get_submodule(layer).dequantize()
    assert torch.equal(weight, body.get_submodule(layer).dequantize())


def test_a_name_that_ends_as_others_do_is_skipped_alone() -> None:
    """Patterns of names to skip match the ends of names as well."""
    from qlora_kernels.integrations.transformers import QLoRAKernelsQuantizer

    quantizer = QLoRAKernelsQuantizer(qlk.QLoRAKernelsConfig(), pre_quantized=False)
    quantizer._undo = dict.fromkeys(("dense", "body.dense", "head"), lambda: None)
    quantizer._skip_more(["dense", "head"])
    assert quantizer.quantization_config.skip == ["^dense$", "head"]


def test_names_that_a_mapping_of_the_caller_changes(
    bodies: Callable[[str], str], tmp_path: Path
) -> None:
    def rename(held: Tensors) -> None:
        for name in [name for name in held if name.startswith("model.")]:
            held[name.replace("model.", "old.", 1)] = held.pop(name)

    path = edited(bodies("llama"), tmp_path / "renamed", rename)
    config = qlk.QLoRAKernelsConfig()
    model = Auto.from_pretrained(
        path, quantization_config=config, key_mapping={r"^old\.": "model."}
    )
    assert not model.hf_quantizer.left
    wanted = Auto.from_pretrained(bodies("llama"), quantization_config=config)
    assert torch.equal(model(tokens()).logits, wanted(tokens()).logits)


def test_a_bias_that_the_checkpoint_lacks_is_zero(
    bodies: Callable[[str], str], tmp_path: Path
) -> None:
    name = "encoder.layer.1.output.dense.bias"
    path = edited(bodies("bert"), tmp_path / "unbiased", lambda held: held.pop(name))
    model = transformers.BertModel.from_pretrained(
        path, quantization_config=qlk.QLoRAKernelsConfig()
    )
    layer = model.encoder.layer[1].output.dense
    assert isinstance(layer, qlk.QuantizedLinear) and not layer.bias.any()
    assert model.encoder.layer[0].output.dense.weight.any()


PART = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("end", ["", "_scale_codes", "_scale_absmax", "_codebook"])
def test_a_quantized_checkpoint_without_a_tensor(
    stored: dict[str, str], end: str, tmp_path: Path
) -> None:
    name = PART + end
    path = edited(stored["qlora_kernels"], tmp_path / "cut", lambda held: held.pop(name))
    with pytest.raises(CheckpointError, match=f"the checkpoint lacks {name}$"):
        Auto.from_pretrained(path)
    state = load_file(Path(path) / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"the checkpoint lacks {name}$"):
        config = transformers.AutoConfig.from_pretrained(path)
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj")


def without_layers(held: Tensors) -> None:
    for name in [name for name in held if name.startswith(LAYERS)]:
        del held[name]


@pytest.mark.parametrize("kind", ["qlora_kernels", "bitsandbytes"])
def test_a_quantized_checkpoint_without_whole_layers(
    stored: dict[str, str], kind: str, tmp_path: Path
) -> None:
    """Not a model with some layers at random, whatever class it is read as."""
    path = edited(stored[kind], tmp_path / "cut", without_layers)
    adopted = {"config": qlk.QLoRAKernelsConfig.adopt(path)} if kind == "bitsandbytes" else {}
    every = f"lacks all of {LAYERS[0]}, {LAYERS[1]}; add to its configuration's skip"
    with pytest.raises(CheckpointError, match=every):
        Auto.from_pretrained(path, **adopted)
    with pytest.raises(CheckpointError, match=every):
        transformers.AutoModelForTokenClassification.from_pretrained(path, **adopted)
    with pytest.raises(CheckpointError, match=f"lacks {', '.join(LAYERS)}$"):
        convert_checkpoint(path, tmp_path / "out", to="dense", progress=False)
    # Unless that is what is asked for.
    file = Path(path) / "config.json"
    fields = json.loads(file.read_text())
    key = "skip" if kind == "qlora_kernels" else "llm_int8_skip_modules"
    fields["quantization_config"][key] = [*LAYERS, "lm_head"]
    file.write_text(json.dumps(fields))
    adopted = {"config": qlk.QLoRAKernelsConfig.adopt(path)} if kind == "bitsandbytes" else {}
    model = Auto.from_pretrained(path, **adopted)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in LAYERS)


def test_a_quantized_mixture_without_experts(bodies: Callable[[str], str], tmp_path: Path) -> None:
    config = qlk.QLoRAKernelsConfig()
    model = Auto.from_pretrained(bodies("mixtral"), quantization_config=config)
    model.save_pretrained(tmp_path / "whole")

    def cut(held: Tensors) -> None:
        for name in [name for name in held if ".1." in name and ".experts." in name]:
            del held[name]

    path = edited(str(tmp_path / "whole"), tmp_path / "cut", cut)
    with pytest.raises(CheckpointError, match=r"lacks all of model\.layers\.1\.mlp\.experts; add"):
        Auto.from_pretrained(path)


def test_a_part_that_is_new_to_the_body(bodies: Callable[[str], str], tmp_path: Path) -> None:
    """Cross-attention over a quantized encoder: in every block, and in none of the files."""
    config = qlk.QLoRAKernelsConfig()
    body = transformers.BertModel.from_pretrained(bodies("bert"), quantization_config=config)
    body.save_pretrained(tmp_path)
    model = transformers.BertLMHeadModel.from_pretrained(
        tmp_path, is_decoder=True, add_cross_attention=True
    )
    layer = model.bert.encoder.layer[1]
    assert isinstance(layer.attention.self.query, qlk.QuantizedLinear)
    assert type(layer.crossattention.self.query) is nn.Linear


@pytest.mark.parametrize("end", ["", ".absmax", ".nested_absmax"])
def test_a_bitsandbytes_checkpoint_without_a_tensor(
    stored: dict[str, str], end: str, tmp_path: Path
) -> None:
    path = edited(stored["bitsandbytes"], tmp_path / "cut", lambda held: held.pop(PART + end))
    config = qlk.QLoRAKernelsConfig.adopt(path)
    with pytest.raises(CheckpointError, match=rf"{PART}: .* must hold 'weight{end}'"):
        Auto.from_pretrained(path, config=config)


@pytest.mark.parametrize(
    ("family", "name", "blamed"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.2.w1.weight",
            "model.layers.1.mlp.experts.gate_up_proj",
        ),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    family: str, name: str, blamed: str, bodies: Callable[[str], str], tmp_path: Path
) -> None:
    path = edited(bodies(family), tmp_path / "nan", lambda held: held[name][3, 4].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=f"{blamed}: .*finite"):
        Auto.from_pretrained(path, quantization_config=qlk.QLoRAKernelsConfig())


def test_block_sizes_of_bitsandbytes(bodies: Callable[[str], str], tmp_path: Path) -> None:
    """Its configuration does not say; its tensors do."""
    for size in (64, 128):
        options = {"checkpoint": "bitsandbytes", "format": "fp4", "block_size": size}
        config = qlk.QLoRAKernelsConfig(**options)
        model = Auto.from_pretrained(bodies("llama"), quantization_config=config)
        model.save_pretrained(tmp_path / str(size))
    adopted = qlk.QLoRAKernelsConfig.adopt(str(tmp_path / "128"))
    assert adopted.quantization_config["block_size"] == 128
    adopted.quantization_config["block_size"] = 64  # as of a name on the hub
    again = Auto.from_pretrained(tmp_path / "128", config=adopted)
    assert again.config.quantization_config.block_size == 128
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    other = load_file(tmp_path / "64" / "model.safetensors")
    wanted = {name: tensor for name, tensor in other.items() if name.startswith(PART)}
    own = qlk.QLoRAKernelsConfig()
    Auto.from_pretrained(bodies("llama"), quantization_config=own).save_pretrained(tmp_path / "own")
    adopted = qlk.QLoRAKernelsConfig.adopt(str(tmp_path / "own"))  # what reads either kind
    assert not Auto.from_pretrained(tmp_path / "own", config=adopted).hf_quantizer.left
    mixed = edited(str(tmp_path / "128"), tmp_path / "mixed", lambda held: held.update(wanted))
    with pytest.raises(CheckpointError, match=rf"{PART}\S* has block size 64; a model here has"):
        qlk.QLoRAKernelsConfig.adopt(mixed)


def test_a_list_to_skip_is_beside_tied_and_output_layers(tmp_path: Path) -> None:
    path = saved(make("llama", tie_word_embeddings=True), tmp_path)
    config = qlk.QLoRAKernelsConfig(checkpoint="bitsandbytes", skip=["q_proj"])
    model = Auto.from_pretrained(path, quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "q")
    fields = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert {"q_proj", "lm_head"} <= set(fields["llm_int8_skip_modules"])
    again = Auto.from_pretrained(
        tmp_path / "q", config=qlk.QLoRAKernelsConfig.adopt(str(tmp_path / "q"))
    )
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
