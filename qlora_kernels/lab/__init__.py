"""Formats under the microscope: `python -m qlora_kernels lab`. `command` is its entry."""
