"""What a launch configuration may know of a GPU, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """One GPU.

    Attributes:
        name: as the driver gives it.
        capability: compute capability times ten: 90 is sm_90.
        sm_count: streaming multiprocessors.
    """

    name: str
    capability: int
    sm_count: int


# Stands in for a GPU where kernels are interpreted or compiled without one.
H200 = DeviceFacts("NVIDIA H200", 90, 132)
A100 = DeviceFacts("NVIDIA A100-SXM4-80GB", 80, 108)
B200 = DeviceFacts("NVIDIA B200", 100, 148)


@lru_cache(maxsize=64)
def _cuda_facts(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    return DeviceFacts(
        properties.name,
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
    )


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts about a CUDA device, asked once; those of an H200 for any other device."""
    if device.type != "cuda":
        return H200
    return _cuda_facts(torch.cuda.current_device() if device.index is None else device.index)
