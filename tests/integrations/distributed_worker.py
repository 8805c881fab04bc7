"""Run by torchrun on two processes: writes what it saw to the JSON file it is given.

Losses and gradients of DDP and FSDP2 are compared with one process on the whole batch.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import qlora_kernels as qlk
from tests.integrations.models import make, tokens


def model_of(kind: str) -> Any:
    """The same model on every process: this library's own layers, or PEFT over quantized ones."""
    model = make("llama")
    torch.manual_seed(1)
    if kind == "own":
        qlk.replace_linear(model, rank=4)
    else:
        import peft

        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                model.set_submodule(name, qlk.QuantizedLinear.from_linear(module))
        options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
        qlk.accelerate(model, verbose=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and kind == "own":
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    named = model.named_parameters()
    gradients = {n.removeprefix("module."): full(p.grad) for n, p in named if p.grad is not None}
    return float(loss.detach()), gradients


def worst(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert got.keys() == wanted.keys() and wanted
    return max(float((got[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def layers_of(model: Any) -> Any:
    return (model.model if hasattr(model.model, "layers") else model.base_model.model.model).layers


def shard(model: Any, wrapped: str, policy: MixedPrecisionPolicy | None = None) -> Any:
    """Adapters with their layer ("together") or as groups of their own ("apart")."""
    mesh = init_device_mesh("cpu", (2,))
    options = {"mesh": mesh} | ({"mp_policy": policy} if policy is not None else {})
    if wrapped == "apart":
        for name, module in model.named_modules():
            if name.endswith((".lora_A.default", ".lora_B.default")):
                fully_shard(module, **options)
    for layer in layers_of(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def quantized_layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, qlk.QuantizedLinear)]


def dense_twin(model: Any) -> Any:
    """The same model over dequantized weights: torch's linear layers, and PEFT's own LoRA."""
    twin = copy.deepcopy(model)
    if hasattr(twin, "peft_config"):
        qlk.deaccelerate(twin)
    for name, module in list(twin.named_modules()):
        if isinstance(module, qlk.QuantizedLinear):
            plain: Any = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = torch.nn.Parameter(module.dequantize(torch.float32), requires_grad=False)
            if isinstance(module, qlk.QLoRALinear):
                plain = qlk.LoRALinear.from_linear(plain, rank=module.rank, alpha=module.alpha)
                plain.lora_a, plain.lora_b = module.lora_a, module.lora_b
            twin.set_submodule(name, plain)
    return twin


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    ids = tokens(4, 12)
    mine = ids[2 * rank : 2 * rank + 2]
    seen: dict[str, float] = {}
    for kind in ("own", "peft"):
        model = model_of(kind)
        loss, gradients = step(model, ids)
        stored = [layer.quantized_weight for layer in quantized_layers(model)]

        def record(name: str, other: Any, loss: float = loss, gradients: Any = gradients) -> None:
            part, got = step(other, mine)
            mean = torch.tensor(part)
            dist.all_reduce(mean)
            seen[f"{name} loss"] = abs(float(mean) / 2 - loss) / loss
            seen[f"{name} gradients"] = worst(got, gradients)

        record(f"{kind} ddp", DistributedDataParallel(copy.deepcopy(model)))
        record(f"{kind} fsdp", sharded := shard(copy.deepcopy(model), "together"))
        held = [layer.weight for layer in quantized_layers(sharded)]
        assert all(isinstance(w, DTensor) and w.dtype == torch.uint8 for w in held)
        seen[f"{kind} local bytes"] = sum(w.to_local().numel() for w in held) / sum(
            w.numel() for w in held
        )
        if kind == "peft":
            record("peft fsdp apart", shard(copy.deepcopy(model), "apart"))
        # bf16 for computing: floating-point parameters are cast on the way, stored bits are not.
        mixed = shard(copy.deepcopy(model), "together", MixedPrecisionPolicy(torch.bfloat16))
        for layer in layers_of(mixed):
            layer.unshard()
        same = [
            torch.equal(layer.dequantize(torch.float32), qlk.dequantize(qw, torch.float32))
            for layer, qw in zip(quantized_layers(mixed), stored, strict=True)
        ]
        seen[f"{kind} mixed precision keeps weights"] = float(all(same))
        for layer in layers_of(mixed):
            layer.reshard()
        _, got = step(mixed, mine)
        seen[f"{kind} mixed precision gradients"] = worst(got, gradients)
        dense = shard(dense_twin(model), "together", MixedPrecisionPolicy(torch.bfloat16))
        _, got = step(dense, mine)
        seen[f"{kind} mixed precision gradients of a dense model"] = worst(got, gradients)
        # Saved by two processes, loaded by one.
        dcp.save(get_model_state_dict(sharded), checkpoint_id=str(out.parent / f"dcp_{kind}"))
        # And into a sharded model of other values.
        other = model_of(kind)
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                torch.nn.init.zeros_(parameter)
        other = shard(other, "together")
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=str(out.parent / f"dcp_{kind}"))
        set_model_state_dict(other, state)
        record(f"{kind} reloaded", other)
    if rank == 0:
        out.write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
