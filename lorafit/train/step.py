"""One optimizer step: forward and backward of its micro-batches, one division, clipping, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorafit.data import Batch
from lorafit.distributed import ALONE, World
from lorafit.errors import RunError
from lorafit.forward import PLAIN, CompiledBlocks
from lorafit.train.objective import Objective


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step: its loss per unit of weight (for tokens: nats per supervised token), the norm of
    its gradient before clipping, its tokens and supervised tokens, and its weight: of all processes. `stop`
    is whether one of them is to end."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    weight: float
    stop: bool


def unchecked(loss: float, finite_gradient: bool, number: int, rate: float) -> None:
    """No check before the update."""


@dataclass(slots=True)
class Stepper:
    """Takes optimizer steps on a model whose trained parameters are `parameters`.

    `check` is called before each update, with the loss, whether the gradient is finite, the step's number
    and its rate; what it raises ends the step before anything has changed. `stop` tells whether this process
    is to end; one of several asks it once, after the step's passes.
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
    stop: Callable[[], int] = lambda: 0
    blocks: CompiledBlocks = PLAIN

    def __call__(self, batches: Sequence[Batch], number: int, rate: float) -> StepResult:
        """Step `number`, with learning rate `rate`, over this process's micro-batches, which need not be on the
        device and may hold no row.

        Each micro-batch's sum is divided by the weight of all of them, so that the gradient is that of one
        large batch. Of several processes each divides by its own before backward, or float16 would overflow
        where one process does not; the reduction makes a mean over all of it. Raises what `check` raises.
        """
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        batches = [batch for batch in batches if batch.counts]
        weight = sum(self.objective.weight(batch) for batch in batches)
        divisor = weight or 1.0
        # without a row, too, the scaler learns its device from what it scales
        losses = [] if batches else [self.scaler.scale(torch.zeros((), device=self.device))]
        for batch in batches:
            loss = self.backward(batch, divisor, self.blocks)
            losses.append(loss / divisor if self.world.alone else loss)
        total = torch.stack(losses).sum()
        tokens, supervised = sum(b.tokens for b in batches), sum(b.supervised for b in batches)
        counts = [weight, float(tokens), float(supervised), 0.0]
        if not self.world.alone:
            counts[-1] = float(self.stop() > 0)
            total, counts = self._reduced(total, counts, divisor)
        weight, tokens, supervised, stop = counts[0], int(counts[1]), int(counts[2]), counts[3] > 0
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        mean, length = torch.stack([total, norm.to(total)]).tolist()  # the one wait for the device in a step
        # under float16 a step whose gradients overflow is skipped by the scaler; elsewhere it is the end
        self.check(mean, self.scaler.is_enabled() or math.isfinite(length), number, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean, length, tokens, supervised, weight, stop)

    def backward(self, batch: Batch, divisor: float, blocks: CompiledBlocks) -> torch.Tensor:
        """The summed loss of a micro-batch; the gradient of it over `divisor`, scaled, is added to the parameters'.
        The blocks are those that run compiled. Raises RunError where one cannot be compiled, or gives no gradient."""
        with blocks.around():
            loss = self.objective.loss_sum(self.model, batch.to(self.device))
            if not loss.requires_grad:
                raise RunError("no gradient reaches what is trained")
            self.scaler.scale(loss / divisor).backward()
        return loss.detach()

    def _reduced(
        self, loss: torch.Tensor, counts: list[float], divisor: float
    ) -> tuple[torch.Tensor, list[float]]:
        """(mean loss, counts) of all processes, and the mean gradient in every parameter: one reduction.

        The gradients are those of a loss that was divided by `divisor`. `counts` begin with the weight that is divided by. A parameter without a gradient on every process has
        none afterwards.
        """
        has = [float(p.grad is not None) for p in self.parameters]
        numbers = torch.cat([loss.view(1), loss.new_tensor([*counts, *has])])
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad.mul_(divisor) for p in self.parameters]
        self.world.sums([numbers, *slopes])
        total, *found = numbers.tolist()
        counts, has = found[: len(counts)], found[len(counts) :]
        for parameter, slope, there in zip(self.parameters, slopes, has, strict=True):
            parameter.grad = slope.div_(counts[0]) if there else None
        return loss.new_tensor(total / counts[0]), counts
