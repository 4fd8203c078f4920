"""A loss that diverges: told from a bad batch, and the last good adapter kept."""

from __future__ import annotations

import math

import torch

from lorafit.adapter import save_adapter
from lorafit.digests import seal
from lorafit.errors import RunError
from lorafit.train.job import Job
from lorafit.train.run_folder import LAST_GOOD

RECENT = 10  # steps over which a loss that keeps growing is told from one bad batch


class Divergence:
    """The adapter as it was when the loss was last good: up to one and a half times the loss of guessing
    at random, or twice what the held-out rows lost before. Without held-out rows, `before` is None and the
    loss of the first step stands for it."""

    def __init__(self, job: Job, before: float | None) -> None:
        self.job = job
        self.guessing = math.log(max(2, job.found.vocab_size))
        self.before = before
        self.copies = [p.detach().clone() for p in job.parameters]
        self.recent = self.guessing if before is None else before
        self.step = 0

    @property
    def most(self) -> float:
        """The largest loss that is good."""
        return max(1.5 * self.guessing, 2 * (self.before or 0.0))

    @torch.no_grad()  # a copy is a value: it remembers no graph
    def judge(self, loss: float, finite_gradient: bool, step: int, rate: float) -> None:
        """Called before the update of `step`. Raises RunError when the run has diverged; the last good
        adapter is in the model then, and saved."""
        if self.before is None and math.isfinite(loss):
            self.before = self.recent = loss
        if math.isfinite(loss):
            self.recent += (loss - self.recent) / RECENT
        if math.isfinite(loss) and finite_gradient and self.recent <= self.most:
            if loss <= self.most:
                torch._foreach_copy_(self.copies, list(self.job.parameters))
                self.step = step - 1
            return
        what = f"the loss rose to {loss:.3g}" if math.isfinite(loss) else f"the loss is {loss}"
        if math.isfinite(loss) and not finite_gradient:
            what = "the gradient is not finite"
        kept = ""
        if self.step:
            torch._foreach_copy_(list(self.job.parameters), self.copies)
            folder = self.job.folder.work / LAST_GOOD
            if self.job.world.first:
                save_adapter(self.job.model, folder)
                seal(folder)
            kept = f"; the adapter after step {self.step} is saved in `{folder}`"
        raise RunError(
            f"{what} at step {step}, learning rate {rate:.2g}{kept}",
            f"a lower --learning-rate, e.g. {rate / 4:.1g}, with --overwrite; or --dtype float32",
        )
