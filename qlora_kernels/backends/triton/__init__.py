"""Triton kernels as registry entries: launchers here, the kernels in `kernels/`, imported at the
first launch, so that importing the library does not import triton."""
