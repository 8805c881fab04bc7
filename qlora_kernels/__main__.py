"""`python -m qlora_kernels`."""

import sys

from qlora_kernels.cli import main

sys.exit(main())
