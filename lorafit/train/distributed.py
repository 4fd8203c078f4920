"""The processes that share a run: for now one, which has every row and decides alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of a run. Only one process is supported: another `size` raises ValueError."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if (self.rank, self.size) != (0, 1):
            raise ValueError(f"process {self.rank} of {self.size}: only one process is supported")

    def share(self, batch: Sequence[T]) -> Sequence[T]:
        """The part of a batch that this process runs: all of it."""
        return batch

    def sums(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make each tensor its sum over all processes, in place: it is."""

    def told(self, value: T) -> T:
        """What process 0 has decided, for all of them."""
        return value

    def agreed(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag


ALONE = World()
