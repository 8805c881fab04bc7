"""bitsandbytes' state-dict layout of one 4-bit linear weight, read and written byte for byte (no
import of it).

Keys for prefix "X.weight.": X.weight, X.weight.absmax, X.weight.quant_map, X.weight.nested_absmax,
X.weight.nested_quant_map, X.weight.quant_state.bitsandbytes__nf4 (or __fp4); see bitsandbytes'
QuantState.as_dict.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from qlora_kernels.errors import CheckpointError, argument_error, type_error
from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.formats.registry import get_format

QUANT_TYPES = ("nf4", "fp4")
STATE_KEY = "quant_state.bitsandbytes__"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_from(name: object, what: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"from_state_dict: {what} must be a torch dtype's name, got {name!r}")
    return dtype


def quant_type_of(fmt: Format) -> str | None:
    """bitsandbytes' name of a format that its layout can hold, or None."""
    held = fmt.plain and fmt.scale_store in ("fp32", "double_quant")
    return fmt.codebook.name if held and fmt.codebook.name in QUANT_TYPES else None


def to_state_dict(
    qw: QuantizedWeight, prefix: str = "weight.", quant_storage: torch.dtype = torch.uint8
) -> dict[str, torch.Tensor]:
    """The tensors bitsandbytes would write for `qw` (nf4 or fp4).

    Args:
        qw: any shape; the codes become (bytes / itemsize, 1) as bitsandbytes stores them.
        prefix: key of the weight with a trailing dot.
        quant_storage: dtype the packed bytes are viewed as (bitsandbytes' quant_storage).

    Raises:
        ArgumentError: a format bitsandbytes does not have, or bytes that quant_storage does not
        divide.
    """
    quant_type = quant_type_of(qw.format)
    if quant_type is None:
        raise argument_error("to_state_dict", "format", f"one of {QUANT_TYPES}", qw.format.name)
    if not isinstance(quant_storage, torch.dtype):
        raise type_error("to_state_dict", "quant_storage", "a torch dtype", quant_storage)
    if qw.codes.numel() % quant_storage.itemsize:
        raise argument_error(
            "to_state_dict",
            "quant_storage",
            f"a dtype whose size divides {qw.codes.numel()} bytes",
            quant_storage,
        )
    key = prefix.removesuffix(".")
    state: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": qw.format.block_size,
        "dtype": _dtype_name(qw.dtype),
        "shape": list(qw.shape),
    }
    out = {key: qw.codes.view(quant_storage).reshape(-1, 1)}
    if qw.absmax is not None:
        out[f"{key}.absmax"] = qw.absmax
    else:
        assert qw.scale_codes is not None
        assert qw.scale_absmax is not None
        assert qw.scale_offset is not None
        out[f"{key}.absmax"] = qw.scale_codes
    out[f"{key}.quant_map"] = torch.tensor(qw.format.codebook.values, device=qw.device)
    if qw.absmax is None:
        assert qw.scale_absmax is not None and qw.scale_offset is not None
        table = qw.scale_codebook if qw.scale_codebook is not None else dynamic8_table(qw.device)
        out[f"{key}.nested_absmax"] = qw.scale_absmax
        # cloned: safetensors refuses two keys over one storage, and the table is shared by all
        # layers
        out[f"{key}.nested_quant_map"] = table.clone()
        state["nested_blocksize"] = qw.format.scale_block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(qw.scale_offset)
    payload = json.dumps(state).encode("utf-8")
    out[f"{key}.{STATE_KEY}{quant_type}"] = torch.tensor(list(payload), dtype=torch.uint8)
    return out


def from_state_dict(
    state_dict: Mapping[str, torch.Tensor], prefix: str = "weight."
) -> QuantizedWeight:
    """Read one weight written by bitsandbytes (any quant_storage, nested or not); tensors are not
    copied.

    A quant_map (or nested_quant_map) that differs from the built-in table wins over it.

    Raises:
        CheckpointError: a key is missing, the quant state is not JSON, or sizes do not fit.
    """
    key = prefix.removesuffix(".")
    state, quant_type = _read_state(state_dict, key)
    weight = _tensor(state_dict, key)
    absmax = _tensor(state_dict, f"{key}.absmax")
    fmt = _read_format(state_dict, key, quant_type, state)
    dtype = _dtype_from(state.get("dtype"), "dtype")
    parts: dict[str, Any] = {"absmax": absmax}
    if "nested_offset" in state:
        table = _tensor(state_dict, f"{key}.nested_quant_map").to(torch.float32)
        builtin = dynamic8_table(table.device)
        parts = {
            "scale_codes": absmax,
            "scale_absmax": _tensor(state_dict, f"{key}.nested_absmax").to(torch.float32),
            "scale_offset": torch.tensor(
                [float(state["nested_offset"])], dtype=torch.float32, device=absmax.device
            ),
            "scale_codebook": None if torch.equal(table, builtin) else table,
        }
        if math.isnan(float(state["nested_offset"])):
            raise CheckpointError("from_state_dict: nested_offset must be a number, got NaN")
    elif absmax.dtype != torch.float32:
        parts["absmax"] = absmax.to(torch.float32)
    codes = weight.contiguous().view(torch.uint8).reshape(-1)
    try:
        return QuantizedWeight.from_parts(
            codes, shape=state.get("shape") or (), dtype=dtype, format=fmt, **parts
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"from_state_dict: {key}: {error}") from error


def _tensor(state_dict: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in state_dict:
        raise CheckpointError(f"from_state_dict: state_dict must hold {key!r}, got no such key")
    return state_dict[key]


def read_quant_state(tensor: torch.Tensor, name: str) -> dict[str, Any]:
    """What bitsandbytes' quant_state tensor of this name says.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    try:
        state = json.loads(bytes(tensor.cpu().tolist()).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, ValueError) as error:
        raise CheckpointError(f"from_state_dict: {name} must be JSON, got {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"from_state_dict: {name} must be a JSON object, got {state}")
    return state


def _read_state(state_dict: Mapping[str, torch.Tensor], key: str) -> tuple[dict[str, Any], str]:
    for quant_type in QUANT_TYPES:
        name = f"{key}.{STATE_KEY}{quant_type}"
        if name in state_dict:
            return read_quant_state(state_dict[name], name), quant_type
    raise CheckpointError(
        f"from_state_dict: state_dict must hold {key}.{STATE_KEY}nf4 or …fp4, got neither"
    )


def _read_format(
    state_dict: Mapping[str, torch.Tensor], key: str, quant_type: str, state: dict[str, Any]
) -> Format:
    fmt = get_format(quant_type)
    quant_map = _tensor(state_dict, f"{key}.quant_map").to(torch.float32).cpu()
    if not torch.equal(quant_map, torch.tensor(fmt.codebook.values)):
        own = Codebook(quant_type, quant_map.tolist(), source="the checkpoint's quant_map")
        fmt = dataclasses.replace(fmt, codebook=own)
    changes: dict[str, Any] = {
        "block_size": state.get("blocksize"),
        "scale_store": "double_quant" if "nested_offset" in state else "fp32",
    }
    if "nested_blocksize" in state:
        changes["scale_block_size"] = state["nested_blocksize"]
    try:
        return dataclasses.replace(fmt, **changes)
    except ValueError as error:
        raise CheckpointError(f"from_state_dict: {key}: {error}") from error
