"""QLoRAKernelsConfig: what the quantizer of `integrations.transformers` is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kernels.errors import CheckpointError, argument_error
from qlora_kernels.formats.bitsandbytes import quant_type_of
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.registry import get_format
from qlora_kernels.integrations.contents import bitsandbytes_block_size
from qlora_kernels.integrations.saving import bitsandbytes_config

QUANT_METHOD = "qlora_kernels"
CHECKPOINTS = ("qlora_kernels", "bitsandbytes")


class QLoRAKernelsConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes a model's linear layers, and what save_pretrained writes.

    Args:
        format: a registered format's name.
        block_size, double_quant: None: the format's own.
        skip: module names (or their ends, or regular expressions) that stay dense, beside those
            that always do: output embeddings, tied weights, the model's keep-in-fp32 modules.
        experts: quantize mixtures of experts that are stored as 3-D parameters.
        embeddings: quantize token embeddings too, where they are not tied.
        checkpoint: "qlora_kernels", or "bitsandbytes" to read and write bitsandbytes' files.
        weight_dtype: name of the dtype the weights had; set on loading.
        bitsandbytes: the fields of the BitsAndBytesConfig that a checkpoint came with.

    Raises:
        ArgumentError: an unknown format, a bad block size, a checkpoint format that cannot hold it.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int | None = None,
        double_quant: bool | None = None,
        skip: Sequence[str] = (),
        experts: bool = True,
        embeddings: bool = False,
        checkpoint: str = "qlora_kernels",
        weight_dtype: str | None = None,
        bitsandbytes: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise argument_error(
                "QLoRAKernelsConfig", "options", "known ones", ", ".join(sorted(unknown))
            )
        if checkpoint not in CHECKPOINTS:
            raise argument_error(
                "QLoRAKernelsConfig", "checkpoint", f"one of {CHECKPOINTS}", repr(checkpoint)
            )
        if checkpoint == "bitsandbytes" and embeddings:
            raise argument_error(
                "QLoRAKernelsConfig", "embeddings", "False for bitsandbytes", embeddings
            )
        resolved = get_format(format).override(block_size, double_quant)
        if checkpoint == "bitsandbytes" and quant_type_of(resolved) is None:
            raise argument_error(
                "QLoRAKernelsConfig", "format", "nf4 or fp4 for bitsandbytes", repr(format)
            )
        # transformers declares it as one of its own methods.
        vars(self)["quant_method"] = QUANT_METHOD
        self.format = format
        self.block_size = resolved.block_size
        self.double_quant = resolved.double_quant
        self.skip = list(skip)
        self.experts = experts and checkpoint != "bitsandbytes"
        self.embeddings = embeddings
        self.checkpoint = checkpoint
        self.weight_dtype = weight_dtype
        self.bitsandbytes = bitsandbytes

    @property
    def storage(self) -> Format:
        """The Format that the fields name."""
        return get_format(self.format).override(self.block_size, self.double_quant)

    @classmethod
    def from_bitsandbytes(cls, config: Any, block_size: int | None = None) -> QLoRAKernelsConfig:
        """The configuration under which a bitsandbytes checkpoint is read into these layers.

        Args:
            config: a BitsAndBytesConfig, or the dict of one.
            block_size: of its weights, which only its tensors tell; loading finds it out.

        Raises:
            CheckpointError: not a 4-bit one.
        """
        fields = config if isinstance(config, dict) else config.to_dict()
        if not fields.get("load_in_4bit"):
            raise CheckpointError(
                "QLoRAKernelsConfig.from_bitsandbytes: config must be of a 4-bit checkpoint"
            )
        return cls(
            format=fields.get("bnb_4bit_quant_type", "fp4"),
            block_size=block_size,
            double_quant=bool(fields.get("bnb_4bit_use_double_quant", False)),
            skip=fields.get("llm_int8_skip_modules") or (),
            checkpoint="bitsandbytes",
            bitsandbytes=fields,
        )

    @classmethod
    def adopt(cls, path: str, **options: Any) -> Any:
        """The model configuration to load a bitsandbytes checkpoint with, into these layers:
        `from_pretrained(path, config=QLoRAKernelsConfig.adopt(path))`. That of a checkpoint of this
        library's own is as it is.

        Args:
            path: a folder or a hub name.
            options: of AutoConfig.from_pretrained.

        Raises:
            CheckpointError: not a 4-bit bitsandbytes checkpoint, or one of several block sizes.
        """
        config = AutoConfig.from_pretrained(path, **options)
        stored = getattr(config, "quantization_config", None)
        if stored is None:
            raise CheckpointError(f"QLoRAKernelsConfig.adopt: {path} is not a quantized checkpoint")
        fields = stored if isinstance(stored, dict) else stored.to_dict()
        if fields.get("quant_method") == QUANT_METHOD:
            return config
        found = cls.from_bitsandbytes(stored)
        # Of a name on the hub, loading reads the files.
        found.block_size = bitsandbytes_block_size(sorted(Path(path).glob("*.safetensors"))) or (
            found.block_size
        )
        config.quantization_config = found.fields()
        return config

    def fields(self) -> dict[str, Any]:
        """The options as from_dict takes them."""
        return dict(self.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: bitsandbytes' own fields when its files are written."""
        return bitsandbytes_config(self) if self.checkpoint == "bitsandbytes" else self.fields()
