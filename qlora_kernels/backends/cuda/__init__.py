"""The CUDA C++ kernels of csrc/kernels as registry entries: a file per op, for sm_80 and newer."""
