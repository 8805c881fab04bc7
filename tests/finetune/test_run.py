"""One method to its end: what it writes, that what it saved is what it measured, and no garbage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_kernels import cli, load_adapter
from qlora_kernels.finetune.checkpoint import Progress, trained_parameters
from qlora_kernels.finetune.command import make_settings
from qlora_kernels.finetune.data import ByteTokenizer, load_windows
from qlora_kernels.finetune.interrupt import StopRequest
from qlora_kernels.finetune.load import load_base, prepare
from qlora_kernels.finetune.loop import Job, evaluate, fit
from qlora_kernels.finetune.optimizers import make_optimizer
from qlora_kernels.finetune.settings import Settings
from tests.finetune.running import Command, losses, write_corpus

KEYS = """train_losses eval_loss_before eval_loss_after trainable_parameters base_bytes
bits_per_parameter peak_bytes tokens_per_second"""


def job_of(settings: Settings) -> Job:
    """The run's model, fresh, and its text."""
    model = prepare(load_base(settings), settings)
    windows = load_windows(settings, ByteTokenizer())
    trained = trained_parameters(model).values()
    optimizer = make_optimizer(trained, settings.optim, settings.lr, settings.torch_device)
    return Job(settings, model, optimizer, windows, Progress(), lambda: None)


def settings_of(command: Command, method: str, *options: str) -> Settings:

    arguments = cli.build_parser().parse_args(command.arguments(options))
    return make_settings(arguments, method, command.folder / "run")


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_report_and_saved_weights(
    method: str, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.here("--method", method, "--out", "run", "--lr", "1e-3") == 0
    out, err = capfd.readouterr()
    run = command.folder / "run"
    report = json.loads((run / "report.json").read_text())["methods"][method]
    assert set(KEYS.split()) <= set(report)
    assert len(report["train_losses"]) == 6
    assert report["eval_loss_after"] < report["eval_loss_before"] < 6
    assert "held-out loss after" in out and f"{report['eval_loss_after']:.4f}" in out
    assert (run / "report.md").read_text().startswith("# Fine-tuning report")
    assert "\r" not in err and "\x1b" not in err and all(err.splitlines())

    settings = settings_of(command, method)
    job = job_of(settings)
    assert evaluate(job, StopRequest()) == report["eval_loss_before"]
    if method == "full":
        job.model.load_state_dict(load_file(run / "model.safetensors"))
    else:
        load_adapter(job.model, run)
    assert evaluate(job, StopRequest()) == report["eval_loss_after"]


def test_sizes_are_those_of_the_model(command: Command) -> None:
    """By hand: 4 layers of 4·256² + 3·256·704 weights; embedding and output 2·256²; 9 norms."""
    linear, dense = 4 * (4 * 256**2 + 3 * 256 * 704), 2 * 256**2 + 9 * 256
    adapters = 4 * (4 * 2 * 256 + 3 * (256 + 704)) * 8
    found = {}
    for method in ("full", "lora", "qlora"):
        options = ("--steps", "1", "--rank", "8", "--dtype", "float32")
        assert command.here("--method", method, "--out", method, *options) == 0
        report = json.loads((command.folder / method / "report.json").read_text())
        found[method] = report["methods"][method]
    assert found["full"]["trainable_parameters"] == linear + dense
    assert found["lora"]["trainable_parameters"] == adapters
    assert found["qlora"]["trainable_parameters"] == adapters
    assert found["lora"]["total_parameters"] == linear + dense + adapters
    assert found["full"]["base_bytes"] == found["lora"]["base_bytes"] == 4 * (linear + dense)
    assert found["full"]["bits_per_parameter"] == 32
    assert found["full"]["quantized_bits_per_parameter"] is None
    codes, scales = linear // 2, linear // 64
    second = sum(-(-n // (64 * 256)) for n in [256**2] * 16 + [256 * 704] * 12) * 4 + 28 * 4
    tables = 28 * 16 * 4
    expected = codes + scales + second + tables + 4 * dense
    assert found["qlora"]["base_bytes"] == expected
    quantized = found["qlora"]["quantized_bits_per_parameter"]
    assert quantized == pytest.approx(8 * (codes + scales + second) / linear, rel=1e-3)
    assert 4.12 < quantized < 4.14
    for report in found.values():
        assert 1e6 < report["peak_bytes"] < 1e9 and report["tokens_per_second"] > 0


def test_same_seed_same_losses_other_seed_others(command: Command) -> None:
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ("--method", "qlora", "--dropout", "0.1", "--seed", seed, "--steps", "3")
        assert command.here(*options, "--out", out) == 0
    a, b, c = (losses(command.folder / out, "qlora") for out in "abc")
    assert a == b
    assert a[0] != c[0]


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], float, float]:
    """What a run of three steps measures with the options as they are."""
    folder = tmp_path_factory.mktemp("by_default")
    command = Command(folder, write_corpus(folder / "corpus.txt"))
    assert command.here("--method", "qlora", "--steps", "3", "--out", str(folder / "run")) == 0
    return losses(folder / "run", "qlora")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--format", "int4"),
        ("--block-size", "256"),
        ("--alpha", "3"),
        ("--dropout", "0.5"),
        ("--schedule", "constant"),
        ("--batch", "1"),
        ("--seq-len", "16"),
        ("--dtype", "float32"),
        ("--targets", "q_proj"),
        ("--rank", "2"),
        ("--lr", "1.1e-2"),
    ],
)
def test_every_option_does_something(
    option: str, value: str, command: Command, by_default: tuple[list[float], float, float]
) -> None:
    assert command.here("--method", "qlora", "--steps", "3", "--out", "run", option, value) == 0
    assert losses(command.folder / "run", "qlora") != by_default


def test_double_quantization_is_an_option(command: Command) -> None:
    bits = {}
    for option in ("--double-quant", "--no-double-quant"):
        run = command.folder / option
        assert command.here("--method", "qlora", "--steps", "1", "--out", str(run), option) == 0
        report = json.loads((run / "report.json").read_text())["methods"]["qlora"]
        bits[option] = report["quantized_bits_per_parameter"]
    assert bits["--no-double-quant"] == 4.5
    assert 4.12 < bits["--double-quant"] < 4.14


def test_diverging_run_says_so(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.here("--method", "full", "--lr", "1e30", "--out", "run") == 1
    err = capfd.readouterr().err
    assert "try a smaller --lr" in err.splitlines()[-1]
    assert not (command.folder / "run" / "report.json").exists()


def test_jsonl_gives_the_same_documents(command: Command, corpus: Path) -> None:
    lines = [json.dumps({"text": corpus.read_text(), "id": 7}), ""]
    (command.folder / "corpus.jsonl").write_text("\n".join(lines))
    for out, data in (("a", str(corpus)), ("b", "corpus.jsonl")):
        options = ("--method", "lora", "--steps", "2", "--data", data, "--out", out)
        assert command.here(*options) == 0
    assert losses(command.folder / "a", "lora") == losses(command.folder / "b", "lora")


def test_adapters_do_not_touch_what_is_frozen(command: Command) -> None:
    settings = settings_of(command, "qlora")
    job = job_of(settings)
    frozen = {n: p.clone() for n, p in job.model.named_parameters() if not p.requires_grad}

    fit(job, StopRequest())
    parameters = dict(job.model.named_parameters())
    assert len(frozen) > 100
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


@pytest.mark.usefixtures("plots")
def test_report_only_says_which_extra_plots_need(
    command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command.here("--method", "lora", "--steps", "1", "--out", "run") == 0
    assert "pip install 'qlora_kernels[plot]'" in capfd.readouterr().err
    assert not (command.folder / "run" / "loss.png").exists()
    assert "loss.png" not in (command.folder / "run" / "report.md").read_text()
