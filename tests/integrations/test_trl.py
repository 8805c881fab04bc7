"""TRL's SFTTrainer over a model of this library's quantizer, its own adapters on the fused path.

TRL is in no extra: it brings pandas, pyarrow and datasets, 270 MB.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qlora_kernels as qlk
from tests.finetune.running import write_corpus
from tests.finetune.test_pretrained import save_tokenizer
from tests.integrations.models import make, saved, transformers

peft = pytest.importorskip("peft", reason="in the hf extra")
trl = pytest.importorskip("trl", reason="pip install trl")
datasets = pytest.importorskip("datasets", reason="comes with trl")


def test_sft_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "corpus.txt")
    size = save_tokenizer(tmp_path / "tokenizer", text)
    path = saved(make("llama", vocab_size=size), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rows = [{"text": part} for part in text.read_text().split("\n\n")[:32]]

    def trainer(steps: int) -> trl.SFTTrainer:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, quantization_config=qlk.QLoRAKernelsConfig(), dtype=torch.float32
        )
        made = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path / "run"),
                max_steps=steps,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                max_length=32,
                gradient_checkpointing=True,
                logging_steps=1,
                save_steps=4,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
        )
        report = qlk.accelerate(made.model, verbose=False)
        assert len(report.fused) == 14
        return made

    def losses(made: trl.SFTTrainer) -> list[float]:
        return [row["loss"] for row in made.state.log_history if "loss" in row]

    whole = trainer(8)
    codes = {n: p.clone() for n, p in whole.model.named_parameters() if p.dtype == torch.uint8}
    assert len(codes) == 14 * 2  # codes and 8-bit scales
    whole.train()
    assert len(losses(whole)) == 8 and losses(whole)[-1] < losses(whole)[0] - 0.5
    for name, parameter in whole.model.named_parameters():
        assert name not in codes or torch.equal(parameter, codes[name])
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    # TRL makes the adapters of a 4-bit model bf16, and PEFT loads them into fp32: equal to the bit
    # up to the first step after that.
    assert losses(resumed)[:5] == losses(whole)[:5]
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-3)
    saved_adapter = tmp_path / "run" / "checkpoint-8" / "adapter_model.safetensors"
    assert saved_adapter.exists()
