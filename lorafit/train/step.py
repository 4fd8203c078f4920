"""One optimizer step: forward and backward of its micro-batches, one division, clipping, the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorafit.data import Batch
from lorafit.train.distributed import ALONE, World
from lorafit.train.objective import Objective


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step: its loss per unit of weight (for tokens: nats per supervised token), the norm of
    its gradient before clipping, its tokens and supervised tokens, and its weight."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    weight: float


def unchecked(loss: float, finite_gradient: bool, number: int, rate: float) -> None:
    """No check before the update."""


@dataclass(slots=True)
class Stepper:
    """Takes optimizer steps on a model whose trained parameters are `parameters`.

    `check` is called before each update, with the loss, whether the gradient is finite, the step's number
    and its rate; what it raises ends the step before anything has changed.
    """

    model: torch.nn.Module
    parameters: Sequence[torch.nn.Parameter]
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    max_grad_norm: float
    check: Callable[[float, bool, int, float], None] = unchecked
    world: World = ALONE

    def __call__(self, batches: Sequence[Batch], number: int, rate: float) -> StepResult:
        """Step `number`, with learning rate `rate`, over its micro-batches, which need not be on the device.

        Each micro-batch's sum is divided by the weight of all of them, so that the gradient is that of one
        large batch. Raises what `check` raises.
        """
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        weight = sum(self.objective.weight(batch) for batch in batches)
        losses = []
        for batch in batches:
            loss = self.objective.loss_sum(self.model, batch.to(self.device)) / weight
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        self.world.sums([total, *(p.grad for p in self.parameters if p.grad is not None)])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        mean = float(total)  # the one wait for the device in a step
        # under float16 a step whose gradients overflow is skipped by the scaler; elsewhere it is the end
        self.check(mean, self.scaler.is_enabled() or bool(norm.isfinite()), number, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            mean, float(norm), sum(b.tokens for b in batches), sum(b.supervised for b in batches), weight
        )
