"""The command line: defaults, and one clear line for everything that cannot be run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlora_kernels import cli
from qlora_kernels.finetune.command import make_settings
from qlora_kernels.finetune.settings import EMBEDDED, PRETRAINED, settings_from_json
from tests.finetune.running import Command, snapshot

BAD_OPTIONS = {
    "unknown option": (("--nonsense",), "--nonsense"),
    "not a number": (("--rank", "x"), "--rank"),
    "unknown method": (("--method", "qalora"), "--method"),
    "unknown format": (("--format", "nf5"), "nf4"),
    "rank 0": (("--rank", "0"), "--rank must be at least 1, got 0"),
    "rank above min(N, K)": (("--rank", "257"), "1 … 256"),
    "no steps": (("--steps", "0"), "--steps"),
    "no batch": (("--batch", "-1"), "--batch"),
    "lr nan": (("--lr", "nan"), "--lr"),
    "lr negative": (("--lr", "-1e-3"), "--lr"),
    "alpha infinite": (("--alpha", "inf"), "--alpha"),
    "dropout above 1": (("--dropout", "1.5"), "--dropout"),
    "negative seed": (("--seed", "-1"), "--seed"),
    "block size": (("--block-size", "48"), "--block-size must be a power of two"),
    "targets": (("--targets", "q_pro"), "q_proj, k_proj"),
    "more text than there is": (("--seq-len", "1000"), "held-out text"),
    "device": (("--device", "tpu"), "--device"),
    "device that is not there": (("--device", "cuda:99"), "--device"),
    "a card without a plan": (("--card", "48"), "--card must be given with --plan, got 48 alone"),
    "no such folder": (("--model", "/nowhere/at/all"), "/nowhere/at/all (no such folder)"),
    "data missing": (("--data", "missing.txt"), "missing.txt (No such file"),
    "data a folder": (("--data", "."), "Is a directory"),
    "out a file": (("--out", "corpus.txt"), "corpus.txt, which is a file"),
    "no checkpoints": (("--checkpoint-every", "0"), "--checkpoint-every"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_one_line_and_status_2(
    case: str, command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options, words = BAD_OPTIONS[case]
    before = snapshot(tmp_path)
    assert command.here("--method", "qlora", *options) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "nothing but blanks"),
        ("blank.txt", b" \n\t\n", "nothing but blanks"),
        ("latin.txt", b"caf\xe9 " * 2000, "UTF-8 text, got latin.txt (byte 3"),
        ("short.txt", b"a few words", "tokens of held-out text"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', "broken.jsonl:2"),
        ("other.jsonl", b'{"body": "no text"}\n', "other.jsonl:1"),
        ("number.jsonl", b'{"text": 3}\n', "number.jsonl:1"),
    ],
)
def test_bad_text_is_named(
    name: str,
    content: bytes,
    words: str,
    command: Command,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    assert command.here("--method", "lora", "--data", name) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


def test_more_positions_than_the_model_has(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("a long text " * 3000)
    assert command.here("--method", "full", "--data", "long.txt", "--seq-len", "1025") == 2
    assert "--seq-len must be at most the model's 1024, got 1025" in capfd.readouterr().err


def test_unreadable_file_in_a_process(command: Command, tmp_path: Path) -> None:
    # A file that even root cannot read, as a failing disk: reading one's own memory at 0 is EIO.
    done = command.run("--method", "qlora", "--data", "/proc/self/mem")
    assert done.returncode == 2
    assert done.stderr.startswith("error: finetune: --data must be readable files, got /proc/self")
    assert done.stderr.count("\n") == 1


def test_comparison_fails_with_its_method_and_says_it_once(
    command: Command, tmp_path: Path
) -> None:
    done = command.run("--rank", "300")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "1 … 256" in done.stderr
    assert done.stdout == "" and not (tmp_path / "out").exists()


def test_help_names_every_option(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["finetune", "--help"])
    assert ended.value.code == 0
    text = capfd.readouterr().out
    options = """model data method format block-size double-quant no-double-quant rank alpha dropout
    targets lr schedule steps batch seq-len dtype device seed out resume checkpoint-every"""
    for option in options.split():
        assert f"--{option}" in text


def settings_of(*options: str, method: str = "qlora") -> dict[str, object]:
    arguments = cli.build_parser().parse_args(["finetune", "--device", "cpu", *options])
    return make_settings(arguments, method, Path("x")).to_json()


def test_defaults_depend_on_the_model() -> None:
    for options, defaults in (((), EMBEDDED), (("--model", "m"), PRETRAINED)):
        found = settings_of(*options)
        assert found["lr"] == defaults.adapter_lr
        assert settings_of(*options, method="full")["lr"] == defaults.full_lr
        for name in ("rank", "steps", "batch", "seq_len"):
            assert found[name] == getattr(defaults, name)
        assert found["alpha"] == defaults.scaling * defaults.rank
    assert settings_of("--rank", "4")["alpha"] == 4 * EMBEDDED.scaling
    assert settings_of("--lr", "1", method="full")["lr"] == 1


def test_settings_survive_the_way_to_a_process(tmp_path: Path) -> None:
    arguments = cli.build_parser().parse_args(
        ["finetune", "--targets", "a", "b", "--data", "c", "d", "--no-double-quant"]
    )
    settings = make_settings(arguments, "lora", tmp_path)
    assert settings_from_json(settings.to_json()) == settings


def test_without_transformers(
    command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert command.here("--model", "base", "--out", "run") == 1
    assert "pip install 'qlora_kernels[hf]'" in capfd.readouterr().err
