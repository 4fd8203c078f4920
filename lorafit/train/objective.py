"""What a run minimises: a loss as a sum, and the weight that the sums of a step are divided by, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lorafit.data import Batch
from lorafit.forward import Forward, Prefix


class Objective(Protocol):
    """A loss of micro-batches. A step's loss is the sum of `loss_sum` over the sum of `weight`: it does not
    depend on how the rows were split, which a mean of means does."""

    def weight(self, batch: Batch) -> float:
        """What a micro-batch counts in the step's mean."""
        ...

    def loss_sum(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of a micro-batch on the device, summed: a float32 scalar that backward starts from."""
        ...


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Cross-entropy in nats, summed over the supervised tokens, each times its weight in the data; with a router's
    auxiliary loss where the model has one in training. The frozen layers are replayed where their output is stored."""

    forward: Forward
    prefix: Prefix

    def weight(self, batch: Batch) -> float:
        """The supervised tokens, or their weights' sum."""
        return batch.weight

    def loss_sum(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with self.prefix.around(batch):
            return self.forward.loss_sum(model, batch)
