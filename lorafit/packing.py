"""Which rows go together: batches of rows of like length, in an order fixed by seed and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

WINDOW = 32  # batches whose rows are sorted by length together: little padding, much mixing


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of one epoch as batches of indices: every row once, `size` to a batch but the last.

    Shuffled, then sorted by length within windows, so that the rows of a batch are padded
    little; then the batches are shuffled. The same seed and epoch give the same batches.
    """
    random = Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    random.shuffle(order)
    made: list[list[int]] = []
    for start in range(0, len(order), size * WINDOW):
        window = sorted(order[start : start + size * WINDOW], key=lambda row: lengths[row])
        made += [window[at : at + size] for at in range(0, len(window), size)]
    random.shuffle(made)
    return made


def in_order(lengths: Sequence[int], size: int) -> list[list[int]]:
    """All rows once, by length, in batches of `size`: for evaluation, where order means nothing."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    return [order[at : at + size] for at in range(0, len(order), size)]


def held_out(count: int, share: float, seed: int, most: int = 200) -> list[int]:
    """The indices of the held-out examples: that share of them, at least 1, at most `most`."""
    wanted = min(most, max(1, round(count * share)))
    return sorted(Random(f"{seed}/held-out").sample(range(count), wanted))
