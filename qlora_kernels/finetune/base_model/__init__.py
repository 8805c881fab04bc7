"""The embedded base model: `model.safetensors`, made by `make.py`."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).with_name("model.safetensors")
