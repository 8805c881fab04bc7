"""L2: the ways to compute an op. Importing this package imports every backend folder, which
registers its kernels."""

from importlib import import_module
from pkgutil import iter_modules

from qlora_kernels.backends import cpu, cuda, dense, torch_reference, triton
from qlora_kernels.backends.registry import (
    OPS,
    KernelEntry,
    Problem,
    backend,
    entries,
    explain_problem,
    register_kernel,
    select,
)

for _folder in (cpu, triton, cuda):
    for _module in iter_modules(_folder.__path__, f"{_folder.__name__}."):
        import_module(_module.name)

__all__ = [
    "OPS",
    "KernelEntry",
    "Problem",
    "backend",
    "dense",
    "entries",
    "explain_problem",
    "register_kernel",
    "select",
    "torch_reference",
]
