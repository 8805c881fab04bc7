"""Run by `accelerate launch` with a FSDP2 configuration on two processes: writes what it saw.

accelerate chooses FSDP on accelerators only; the two lines that name the kind of its process group
are all that stands in for GPUs here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.integrations.distributed_worker import full, model_of, quantized_layers, step, worst
from tests.integrations.models import tokens


def main(out: Path) -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.set_num_threads(1)
    accelerator = Accelerator()
    seen: dict[str, object] = {"kind": str(accelerator.distributed_type)}
    ids = tokens(4, 12)
    mine = ids[2 * accelerator.process_index : 2 * accelerator.process_index + 2]
    for kind in ("own", "peft"):
        model, whole = model_of(kind), model_of(kind)
        optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=0.01)
        if accelerator.process_index == 1:
            # The configuration loads on the first process and sends; others have nothing to keep.
            for parameter in model.parameters():
                parameter.data.zero_()
        trained = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model, trained = accelerator.prepare(model, trained)
        held = [layer.weight for layer in quantized_layers(model)]
        seen[f"{kind} sharded"] = isinstance(model, FSDPModule) and all(
            isinstance(w, DTensor) and w.dtype == torch.uint8 for w in held
        )
        seen[f"{kind} layers"] = sum(isinstance(m, FSDPModule) for m in model.modules())
        for number in range(2):  # the second step sees what the first one changed
            wanted_loss, wanted = step(whole, ids)
            optimizer.step()
            model.zero_grad()
            loss = model(input_ids=mine, labels=mine).loss
            accelerator.backward(loss)
            got = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            trained.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            seen[f"{kind} loss {number}"] = abs(float(mean) / 2 - wanted_loss) / wanted_loss
            seen[f"{kind} gradients {number}"] = worst(got, wanted)
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            expected = whole.state_dict()
            frozen = [n for n, p in whole.named_parameters() if not p.requires_grad]
            seen[f"{kind} frozen"] = all(torch.equal(state[n], expected[n]) for n in frozen)
            # In shares of a step's largest change, the learning rate: Adam divides by a gradient's
            # own size, and with it by its rounding where it is small.
            seen[f"{kind} trained"] = max(
                float((state[n] - expected[n]).abs().max()) / 0.01
                for n in expected
                if n not in frozen
            )
    if accelerator.is_main_process:
        out.write_text(json.dumps(seen))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
