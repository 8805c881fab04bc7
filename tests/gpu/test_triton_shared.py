"""The interpreter's tests of the Triton kernels, on a GPU."""

from __future__ import annotations

import pytest

from tests.triton.interpreter.test_codecs import *  # noqa: F403
from tests.triton.interpreter.test_dequantize_many import *  # noqa: F403
from tests.triton.interpreter.test_group import *  # noqa: F403
from tests.triton.interpreter.test_matmul import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
