"""What each layer alone costs, by both metrics, against direct computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qlora_kernels import dequantize, quantize
from qlora_kernels.errors import ArgumentError
from qlora_kernels.lab import sensitivity
from qlora_kernels.lab.cache import CellCache
from qlora_kernels.lab.sensitivity import layer_inputs, measure_layers, realised_error
from qlora_kernels.lab.studied import LanguageModel, studied_model
from qlora_kernels.lab.variants import Variant
from tests.finetune.running import write_corpus
from tests.lab.running import TwoLayers, needs_minilm

NF4, INT4 = Variant.of("nf4", {}), Variant.of("int4", {})


def quantized(weight: torch.Tensor, variant: Variant) -> torch.Tensor:
    return dequantize(quantize(weight, variant.format), torch.float32)


def test_model_metric(tmp_path: Path) -> None:
    """The error with one layer swapped; bytes are the stored ones; the model is as it was."""
    studied = TwoLayers()
    before = {name: layer.weight.clone() for name, layer in studied.layers.items()}
    with CellCache(tmp_path) as cache:
        costs = measure_layers(studied, [NF4, INT4], "model", cache)
    assert list(costs) == ["0", "2"]
    for name, layer in studied.layers.items():
        assert torch.equal(layer.weight, before[name])
        for cost, variant in zip(costs[name], (NF4, INT4), strict=True):
            qw = quantize(layer.weight, variant.format)
            assert (cost.numel, cost.nbytes, cost.variant) == (qw.numel, qw.nbytes, variant)
            layer.weight.data.copy_(quantized(before[name], variant))
            assert cost.error == studied.error() > 0
            layer.weight.data.copy_(before[name])
    assert studied.error() == 0


def test_output_metric(tmp_path: Path) -> None:
    """‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖² over the calibration inputs of each layer."""
    studied = TwoLayers()
    x = studied.parts["calibration"]
    inputs = {"0": x, "2": torch.tanh(studied.model[0](x)).detach()}
    with CellCache(tmp_path) as cache:
        costs = measure_layers(studied, [NF4], "output", cache)
    for name, layer in studied.layers.items():
        lost = quantized(layer.weight, NF4) - layer.weight
        wanted = (inputs[name] @ lost.t()).norm() ** 2 / (
            inputs[name] @ layer.weight.t()
        ).norm() ** 2
        assert costs[name][0].error == pytest.approx(float(wanted), rel=1e-4)


def test_inputs_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    studied = TwoLayers()
    monkeypatch.setattr(sensitivity, "MAX_ROWS", 7)
    seen = layer_inputs(studied, ["0"])["0"]
    assert seen.shape == (7, 64)
    assert torch.equal(seen[[0, -1]], studied.parts["calibration"][[0, -1]])


def test_realised_output_error_is_with_the_new_inputs(tmp_path: Path) -> None:
    studied = TwoLayers()
    exact = {name: layer.weight.clone() for name, layer in studied.layers.items()}
    found, loss = realised_error(studied, {"0": NF4, "2": INT4}, "output")
    assert loss is None
    x = studied.parts["calibration"]
    first, last = studied.layers["0"], studied.layers["2"]
    swapped = quantized(exact["0"], NF4), quantized(exact["2"], INT4)
    y0, y1 = F.linear(x, exact["0"]), F.linear(x, swapped[0])
    z0 = F.linear(torch.tanh(y0 + first.bias), exact["2"])
    z1 = F.linear(torch.tanh(y1 + first.bias), swapped[1])
    wanted = (y1 - y0).norm() ** 2 / y0.norm() ** 2 + (z1 - z0).norm() ** 2 / z0.norm() ** 2
    assert found == pytest.approx(float(wanted), rel=1e-4)
    assert torch.equal(last.weight, exact["2"])


def test_cells_are_the_model_s_and_the_text_s(tmp_path: Path) -> None:
    with CellCache(tmp_path) as cache:
        first = measure_layers(TwoLayers(), [NF4], "model", cache)
        assert cache.computed == 2
        assert measure_layers(TwoLayers(), [NF4], "model", cache) == first
        assert cache.computed == 2
        measure_layers(TwoLayers(seed=1), [NF4], "model", cache)
        other_text = TwoLayers()
        other_text.parts["held-out"] = torch.randn(10, 64)
        other_text.dense = other_text.model(other_text.parts["held-out"]).detach()
        measure_layers(other_text, [NF4], "model", cache)
        measure_layers(TwoLayers(), [NF4], "output", cache)
        assert cache.computed == 8


def test_layers_by_name() -> None:
    assert list(TwoLayers(chosen="2").layers) == ["2"]
    for chosen in ("q_proj", "("):
        with pytest.raises(ArgumentError, match="--layers"):
            TwoLayers(chosen=chosen)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    corpus = write_corpus(tmp_path_factory.mktemp("text") / "corpus.txt")
    found = studied_model("embedded", [str(corpus)], 2, "layers.0", 32, seed=0)
    assert isinstance(found, LanguageModel)
    return found


def test_a_language_model_is_judged_by_its_divergence(embedded: LanguageModel) -> None:
    """KL of the dense model's next-token distributions against what they have become."""
    assert len(embedded.layers) == 7
    assert embedded.error() == pytest.approx(0, abs=1e-12)
    name = "layers.0.mlp.down_proj"
    replaced = {name: quantized(embedded.layers[name].weight, INT4)}
    windows = embedded.parts["held-out"][:, :-1]
    with torch.no_grad():
        dense = embedded.model(windows).double().log_softmax(-1)
        with embedded.weights(replaced):
            now = embedded.model(windows).double().log_softmax(-1)
            found, loss = embedded.error(), embedded.loss()
    wanted = (dense.exp() * (dense - now)).sum(-1).mean()
    assert found == pytest.approx(float(wanted), rel=1e-3)
    targets = embedded.parts["held-out"][:, 1:]
    wanted = F.nll_loss(now.flatten(0, 1), targets.flatten())
    assert loss == pytest.approx(float(wanted), rel=1e-5)


def test_calibration_and_held_out_text_differ(embedded: LanguageModel) -> None:
    assert not torch.equal(embedded.parts["calibration"], embedded.parts["held-out"])


@needs_minilm
def test_an_encoder_is_judged_by_its_embeddings() -> None:
    studied = studied_model("minilm", [], 4, r"layer\.0.*dense", 32, seed=0)
    assert len(studied.layers) == 3
    assert studied.error() == pytest.approx(0, abs=1e-7)
    replaced = {name: quantized(layer.weight, NF4) for name, layer in studied.layers.items()}
    with studied.weights(replaced):
        assert 1e-5 < studied.error() < 0.1
    assert studied.error() == pytest.approx(0, abs=1e-7)


def test_minilm_takes_no_text() -> None:
    with pytest.raises(ArgumentError, match="--data must be left out with minilm"):
        studied_model("minilm", ["x.txt"], 4, "", 32, seed=0)


def test_a_pretrained_language_model(tmp_path: Path) -> None:
    """As transformers loads it; the assignment's names are its own layers'."""
    pytest.importorskip("transformers", reason="the hf extra")
    from tests.finetune.test_pretrained import save_llama, save_tokenizer

    text = write_corpus(tmp_path / "corpus.txt")
    save_llama(tmp_path / "base", save_tokenizer(tmp_path / "base", text))
    studied = studied_model(str(tmp_path / "base"), [str(text)], 2, "mlp.up_proj", 32, seed=0)
    assert list(studied.layers) == [f"model.layers.{n}.mlp.up_proj" for n in range(2)]
    with CellCache(tmp_path) as cache:
        for metric in ("model", "output"):
            costs = measure_layers(studied, [NF4, INT4], metric, cache)
            assert all(0 < cost.error < 0.1 for layer in costs.values() for cost in layer)
    assert studied.error() == pytest.approx(0, abs=1e-12)
