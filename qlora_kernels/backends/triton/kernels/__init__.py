"""The Triton kernels. Importing a module here imports triton, so launchers do it late."""
