"""The C++ kernels of csrc/kernels_cpu as registry entries: a file per op, an entry per level."""
