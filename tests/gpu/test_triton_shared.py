"""The interpreter's tests of the Triton kernels, on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.triton.interpreter.test_codecs import *  # noqa: F403
from tests.triton.interpreter.test_dequantize_many import *  # noqa: F403
from tests.triton.interpreter.test_group import *  # noqa: F403
from tests.triton.interpreter.test_matmul import *  # noqa: F403
from tests.triton.interpreter.test_prmt import *  # noqa: F403
from tests.triton.interpreter.test_prmt import check_decode

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gpu_permutes_bytes_like_the_model(device: torch.device, dtype: torch.dtype) -> None:
    check_decode(device, dtype)
