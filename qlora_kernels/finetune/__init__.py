"""The main job: `python -m qlora_kernels finetune`. `command` is its entry."""
