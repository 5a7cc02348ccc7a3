"""The teacher: an exponential moving average of the student (paper, section 3.1)."""

from __future__ import annotations

import torch
from torch import nn


def ema_momentum(step: int, momentum: float, ramp: bool = True) -> float:
    """min(momentum, 1 - 1 / (step + 1)) for steps from 0: after the first the teacher is an exact copy.

    Args:
        step: from 0.
        momentum: in the long run.
        ramp: false: `momentum` from the first step on, as the paper has it.
    """
    return min(momentum, 1 - 1 / (step + 1)) if ramp else momentum


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
