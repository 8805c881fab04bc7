"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(step: int, steps: int, schedule: str, warmup_steps: int) -> float:
    """Factor on the peak learning rate at 0-based ``step`` of ``steps``: a linear rise over
    ``warmup_steps``, then constant, or a cosine or linear fall to 0 just after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    return 1.0
