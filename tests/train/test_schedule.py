"""The learning rate of each step, compared with transformers' own schedules."""

from dataclasses import replace

import pytest
import torch
from transformers import get_scheduler

from lorafit.settings.precedence import settle
from lorafit.train.schedule import rates, warmup_steps


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 12, 87, 250])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.9, 7, 1000])
def test_every_rate_is_transformers_own_and_reaches_the_peak(scheduler, steps, warmup):
    config = replace(settle({})[0], learning_rate=0.001, scheduler=scheduler, warmup=warmup)
    ours = rates(config, steps)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.001)
    schedule = get_scheduler(
        scheduler, optimizer, num_warmup_steps=warmup_steps(warmup, steps), num_training_steps=steps
    )
    seen = []
    for step in range(1, steps + 1):
        assert ours(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        seen.append(ours(step))
        optimizer.step()
        schedule.step()
    assert max(seen) == 0.001 and min(seen) >= 0


def test_a_share_of_the_steps_is_rounded_up_and_leaves_one():
    assert [warmup_steps(0.05, n) for n in (1, 2, 12, 20, 21, 400)] == [0, 1, 1, 1, 2, 20]
    assert [warmup_steps(0.9, n) for n in (1, 3, 12)] == [0, 2, 11]
    assert [warmup_steps(n, 12) for n in (0, 1, 5, 12, 99)] == [0, 1, 5, 11, 11]
