"""The learning rate of each optimizer step: transformers' schedules, by their names."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from transformers import get_scheduler

from lorafit.settings import RunConfig


def warmup_steps(warmup: float, steps: int) -> int:
    """Whole steps of warm-up: a share of the run's `steps` below 1, rounded up, or a number of steps from 1 on.

    At least one step is left after them, so that the peak is reached.
    """
    asked = ceil(warmup * steps) if warmup < 1 else int(warmup)
    return min(asked, max(0, steps - 1))


def rates(config: RunConfig, steps: int) -> Callable[[int], float]:
    """The rate of optimizer step 1 to `steps`, as `transformers.get_scheduler` gives it for as many steps
    of warm-up: never above the peak, which is `config.learning_rate`.
    """
    peak = config.learning_rate or 0.0
    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        config.scheduler,
        nothing,
        num_warmup_steps=warmup_steps(config.warmup, steps),
        num_training_steps=steps,
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return lambda step: peak * factor(step - 1)
