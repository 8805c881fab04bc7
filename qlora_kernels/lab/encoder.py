"""A sentence encoder with its weights swapped for quantized ones, and how far that turns its
embeddings: what an error of weights means for what the model does."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kernels.errors import QLKError

MAX_TOKENS = 32
WHOLE = slice(None)


def sentences(count: int) -> list[str]:
    """The first ``count`` sentences of 40 to 160 characters of the language reference that every
    Python carries; a given Python always yields the same ones."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for name in sorted(topics):
        paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(topics[name]))
        # The first paragraph of a topic is its heading.
        for paragraph in paragraphs[1:]:
            for part in re.split(r"(?<=[.:])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z][^*|=]{38,158}\.", part):
                    found[part] = None
        if len(found) >= count:
            break
    return list(found)[:count]


class SentenceEncoder:
    """A transformers encoder in fp32 with mean pooling, and its embeddings of some sentences.

    Args:
        folder: of the model, as transformers saves one.
        count: how many sentences.

    Raises:
        QLKError: transformers is not installed, or does not load the model.
    """

    def __init__(self, folder: Path, count: int = 32) -> None:
        try:
            import transformers
        except ImportError as error:
            raise QLKError(
                "lab: embeddings need transformers: pip install 'qlora_kernels[lab]'"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            # transformers gives its own kind of attention the name of torch's.
            loaded: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise QLKError(f"lab: {folder} does not load as an encoder ({error})") from error
        self.model: nn.Module = loaded.eval()
        self.texts = sentences(count)
        self.inputs: Mapping[str, Tensor] = dict(
            tokenizer(
                self.texts,
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
        )
        self.dense = self.embed()

    @torch.no_grad()
    def embed(self, part: slice = WHOLE) -> Tensor:
        """Embeddings [sentences, size], normalised, with the weights that the model has now.

        Args:
            part: of the sentences.
        """
        inputs = {name: tensor[part] for name, tensor in self.inputs.items()}
        hidden = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def cosines(self, part: slice = WHOLE) -> Tensor:
        """Cosine of each sentence's embedding now with the dense model's; fp64."""
        return F.cosine_similarity(self.embed(part).double(), self.dense[part].double())

    @torch.no_grad()
    def set_weight(self, name: str, weight: Tensor) -> None:
        """Overwrite a parameter, by its name in the checkpoint."""
        self.model.get_parameter(name).copy_(weight)
