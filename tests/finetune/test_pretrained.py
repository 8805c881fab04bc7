"""`--model`: causal language models as transformers loads them, adapters as peft does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_kernels import QLoRAKernelsConfig, QLoRALinear, load_adapter, replace_linear
from qlora_kernels.errors import ArgumentError
from qlora_kernels.finetune import loop
from qlora_kernels.finetune.data import load_windows
from qlora_kernels.finetune.load import load_base, load_tokenizer, prepare
from qlora_kernels.finetune.settings import Settings
from tests.finetune.running import Command, losses, snapshot, write_corpus

transformers = pytest.importorskip("transformers", reason="the hf extra")
tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")

OPTIONS = ("--model", "base", "--rank", "4", "--lr", "1e-2", "--out", "run")


def save_tokenizer(folder: Path, text: Path) -> int:
    """A byte-pair tokenizer trained on ``text``; returns the size of its vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_llama(folder: Path, vocab_size: int, **changes: Any) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **changes,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `base`, a tiny Llama with random weights, and its text."""
    folder = tmp_path_factory.mktemp("pretrained")
    text = write_corpus(folder / "corpus.txt")
    save_llama(folder / "base", save_tokenizer(folder / "base", text))
    return folder


@pytest.fixture
def llama(base: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command beside `base`."""
    monkeypatch.chdir(base)
    return Command(base, base / "corpus.txt")


def load(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_qlora_is_the_default_and_learns(llama: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = (*OPTIONS[:-1], str(run), "--steps", "30", "--dtype", "float32")
    assert llama.here(*options) == 0
    train, before, after = losses(run, "qlora")
    assert len(train) == 30 and after < before - 0.5
    report = json.loads((run / "report.json").read_text())["methods"]["qlora"]
    assert report["settings"]["method"] == "qlora"
    assert report["quantized_bits_per_parameter"] < 4.5


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_peft_loads_the_adapter(method: str, llama: Command, tmp_path: Path) -> None:
    """On the dense base, peft computes what LoRA computes; on the dequantized one, QLoRA."""
    peft = pytest.importorskip("peft", reason="the hf extra")
    run = tmp_path / "run"
    options = (*OPTIONS[:-1], str(run), "--method", method, "--dtype", "float32")
    assert llama.here(*options) == 0
    ids = torch.arange(40)[None] % 256

    ours = load(llama.folder / "base")
    if method == "qlora":
        replace_linear(ours, rank=4)
    load_adapter(ours, run)
    dense = load(llama.folder / "base")
    untrained = dense(ids).logits
    if method == "qlora":
        for name, module in ours.named_modules():
            if isinstance(module, QLoRALinear):
                dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    theirs = peft.PeftModel.from_pretrained(dense, run).eval()
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
    assert (expected - untrained).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (
        json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    )


def test_full_model_loads_again(llama: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = (*OPTIONS[:-1], str(run), "--method", "full", "--lr", "1e-3")
    assert llama.here(*options) == 0
    ids = torch.arange(40)[None] % 256
    with torch.no_grad():
        before = load(llama.folder / "base")(ids).logits
        after = load(run / "model")(ids).logits
    assert not torch.equal(before, after)
    text = "return x"
    for folder in (llama.folder / "base", run / "model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (run / "model").stat().st_mode & 0o777 == run.stat().st_mode & 0o777
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_pretrained_run_resumes_bit_for_bit(llama: Command, tmp_path: Path) -> None:
    options = (*OPTIONS[:-1], str(tmp_path / "whole"), "--dropout", "0.1")
    assert llama.here(*options) == 0
    prelude = "from qlora_kernels.finetune import run\nsave = run.save_checkpoint\n"
    prelude += "def dies(path, model, optimizer, progress, identity):\n"
    prelude += "    save(path, model, optimizer, progress, identity)\n"
    prelude += "    if progress.step == 4:\n        import os\n        os.kill(os.getpid(), 9)\n"
    prelude += "run.save_checkpoint = dies\n"
    options = (*options[:-3], str(tmp_path / "run"), *options[-2:])
    assert llama.run(*options, prelude=prelude).returncode == -9
    assert llama.here(*options, "--resume") == 0
    assert losses(tmp_path / "run", "qlora") == losses(tmp_path / "whole", "qlora")


def test_tied_and_differently_named_output_layers_get_no_adapter(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "corpus.txt")
    size = save_tokenizer(tmp_path / "tied", text)
    save_llama(tmp_path / "tied", size, tie_word_embeddings=True)
    config = transformers.BertConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
        tie_word_embeddings=False,
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    # Two layers of seven; one of six and the transformation before the output layer.
    for name, head, adapted in (("tied", "lm_head", 14), ("bert", "cls.predictions.decoder", 7)):
        settings = Settings("qlora", tmp_path, model=str(tmp_path / name), rank=4, seq_len=32)
        base = load_base(settings)
        assert base.head == head
        model = prepare(base, settings)
        replaced = [n for n, m in model.named_modules() if isinstance(m, QLoRALinear)]
        assert len(replaced) == adapted and head not in replaced
        assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    config.is_decoder = False  # which transformers takes all the same, to train it to copy
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ArgumentError, match=r"--model must be a causal .*bert, an encoder"):
        load_base(settings)


def gpt2(folder: Path) -> None:
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def small_vocabulary(folder: Path) -> None:
    save_llama(folder, 200)


def truncated(folder: Path) -> None:
    save_llama(folder, 300)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    save_llama(folder, 300)
    (folder / "model.safetensors").unlink()


def not_a_causal_model(folder: Path) -> None:
    config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def save_quantized(folder: Path, source: Path, kind: str) -> dict[str, torch.Tensor]:
    """A quantized checkpoint of `source`, by this library or by bitsandbytes; its packed codes."""
    if kind == "qlora_kernels":
        how: Any = QLoRAKernelsConfig(format="fp4", block_size=32, double_quant=False)
    else:
        pytest.importorskip("bitsandbytes", reason="the bnb extra")
        how = transformers.BitsAndBytesConfig(load_in_4bit=True)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(source, quantization_config=how, dtype=torch.float32)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return {name: p.view(-1) for name, p in model.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize("kind", ["qlora_kernels", "bitsandbytes"])
def test_quantized_checkpoints_are_taken_as_they_are(
    kind: str, llama: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = save_quantized(tmp_path / "fp4", llama.folder / "base", kind)
    options = ("--model", str(tmp_path / "fp4"), "--rank", "4", "--dtype", "float32")
    # Both are of fp4 without double quantization: no option is to be given to take them.
    stored = {"format": "fp4", "double_quant": False}
    settings = Settings("qlora", tmp_path, model=options[1], rank=4, seq_len=32, **stored)
    model = prepare(load_base(settings), settings)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLoRALinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.quantized_weight.codes, codes[f"{name}.weight"])
    run = tmp_path / "run"
    assert llama.here(*options, "--lr", "1e-2", "--out", str(run)) == 0
    train, before, after = losses(run, "qlora")
    assert len(train) == 6 and after < before
    report = json.loads((run / "report.json").read_text())["methods"]["qlora"]
    assert report["settings"].items() >= stored.items()
    dense = sum(p.numel() for p in load(llama.folder / "base").parameters())
    assert report["total_parameters"] == dense + report["trainable_parameters"]
    for wrong, words in (
        (("--format", "nf4"), "--format must be as the model was quantized (fp4)"),
        (("--format", "fp4", "--double-quant"), "--double-quant must be as"),
        (("--block-size", "128"), "--block-size must be as"),
        (("--method", "lora"), "--model must be a dense model"),
    ):
        capfd.readouterr()
        assert llama.here(*options, *wrong, "--out", str(tmp_path / "other")) == 2
        assert words in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_gpt2_is_adapted_though_its_layers_are_not_linear(
    method: str, command: Command, tmp_path: Path
) -> None:
    """transformers' Conv1D; its adapter is what PEFT has for such a layer."""
    peft = pytest.importorskip("peft", reason="the hf extra")
    gpt2(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2", command.folder / "corpus.txt")
    options = ("--model", "gpt2", "--rank", "4", "--lr", "1e-2", "--dtype", "float32")
    assert command.here(*options, "--method", method, "--out", "run") == 0
    _, before, after = losses(tmp_path / "run", method)
    assert after < before
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["fan_in_fan_out"]
    how = {"quantization_config": QLoRAKernelsConfig()} if method == "qlora" else {}
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gpt2", dtype=torch.float32, **how
    )
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "run").eval()
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4
    windows = load_windows(
        Settings("qlora", tmp_path, data=(str(tmp_path / "corpus.txt"),), seq_len=32),
        load_tokenizer(Settings("qlora", tmp_path, model=str(tmp_path / "gpt2"))),
    )
    held_out = windows.held_out.long()
    with torch.no_grad():
        logits = model(held_out[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert float(loss) == pytest.approx(after, abs=1e-4)


def dies_at(last: int, train_step: Any) -> Any:
    def dying(job: Any, step: int) -> float:
        if step == last:
            raise SystemError("killed")
        return float(train_step(job, step))

    return dying


def test_mixture_of_experts_is_quantized_whole(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experts are no linear layers: they are stored in 4 bits and get adapters too, which PEFT
    loads and `--resume` goes on with."""
    peft = pytest.importorskip("peft", reason="the hf extra")
    size = save_tokenizer(tmp_path / "mixture", tmp_path / "corpus.txt")
    config = transformers.MixtralConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    dense = transformers.MixtralForCausalLM(config)
    dense.save_pretrained(tmp_path / "mixture")
    options = ("--model", "mixture", "--rank", "4", "--lr", "1e-2", "--dtype", "float32")
    assert command.here(*options, "--out", "run") == 0
    _, before, after = losses(tmp_path / "run", "qlora")
    assert after < before
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in tensors.values())
    assert sum(".experts." in name for name in tensors) == 4
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "mixture", quantization_config=QLoRAKernelsConfig(), dtype=torch.float32
    )
    ids = torch.arange(40)[None] % 256
    theirs = peft.PeftModel.from_pretrained(quantized, tmp_path / "run").eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = theirs.unload()
        load_adapter(ours, tmp_path / "run")
        torch.testing.assert_close(ours(ids).logits, expected, atol=2e-5, rtol=1e-5)
    monkeypatch.setattr(loop, "train_step", dies_at(4, loop.train_step))
    with pytest.raises(SystemError):
        command.here(*options, "--out", "again")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert command.here(*options, "--out", "again", "--resume") == 0
    assert losses(tmp_path / "again", "qlora") == losses(tmp_path / "run", "qlora")
    report = json.loads((tmp_path / "run" / "report.json").read_text())["methods"]["qlora"]
    parameters = sum(p.numel() for p in dense.parameters())
    assert report["total_parameters"] == parameters + report["trainable_parameters"]
    kept = sum(p.numel() for n, p in dense.named_parameters() if p.dim() < 2 or "_proj" not in n)
    assert report["base_bytes"] < 4 * kept + 0.6 * (parameters - kept)


@pytest.mark.parametrize(
    ("make", "status", "words"),
    [
        (small_vocabulary, 1, "the model has 200 embeddings"),
        (truncated, 2, "--model must be a causal language model that transformers loads"),
        (no_weights, 2, "--model must be a causal language model that transformers loads"),
        (not_a_causal_model, 2, "--model must be a causal language model that transformers loads"),
    ],
)
def test_models_that_cannot_be_tuned(
    make: Any, status: int, words: str, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = command.folder / "broken"
    make(folder)
    save_tokenizer(folder, command.folder / "corpus.txt")
    before = snapshot(folder)
    capfd.readouterr()
    assert command.here("--model", "broken", "--out", "run", "--rank", "4") == status
    err = capfd.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and words in err
    assert snapshot(folder) == before and not (command.folder / "run").exists()


def test_model_that_is_not_there(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.here("--model", str(command.folder / "missing"), "--out", "run") == 2
    assert "--model must be a causal" in capfd.readouterr().err.splitlines()[-1]


def test_rank_above_the_smallest_layer(
    llama: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Grouped keys have 32 outputs: a rank of 33 fits the other layers and not them."""
    options = (*OPTIONS, "--rank", "33", "--out", str(tmp_path / "run"))
    assert llama.here(*options) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert "--rank must be in 1 … 32, for model.layers.0.self_attn.k_proj" in err
    assert not (tmp_path / "run").exists()


def test_a_target_that_is_not_there_is_named(
    llama: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = (*OPTIONS, "--targets", "q_proj", "nosuch", "--out", str(tmp_path / "run"))
    assert llama.here(*options) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert "--targets must be out of q_proj, k_proj" in err and err.endswith("got nosuch")


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_float16_learns_as_float32_does(method: str, llama: Command, tmp_path: Path) -> None:
    """Gradients of a mean over the tokens of a step would be below its smallest number."""
    found = {}
    for dtype in ("float16", "float32"):
        options = (*OPTIONS[:-1], str(tmp_path / dtype), "--method", method, "--dtype", dtype)
        assert llama.here(*options) == 0
        found[dtype] = losses(tmp_path / dtype, method)[1:]
    assert found["float16"] == pytest.approx(found["float32"], abs=0.01)
