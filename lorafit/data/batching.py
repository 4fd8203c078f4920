"""Which rows go together: batches of rows of like length, fixed for the run, and their order in an epoch.

What is in a batch never changes, so what was computed of it in one epoch holds in the next (prefix.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from random import Random

MASKED_SHARE = 0.15  # of the tokens a masked model may learn, those that are hidden
MOST_PADDING = 0.05  # of the tokens that are processed

MicroBatch = tuple[int, ...]  # rows that are run together: a micro-batch


def batches(lengths: Sequence[int], size: int, seed: int) -> list[tuple[MicroBatch, ...]]:
    """All rows in batches of `size`, the last may be smaller; each batch in the parts it is run in.

    Rows are sorted by length, those of one length in an order that the seed decides. A batch is
    one part, unless padding would be more than MOST_PADDING of all that is processed: then the
    batches that waste most are run in parts of like length, which changes no gradient.
    """
    order = list(range(len(lengths)))
    Random(seed).shuffle(order)
    order.sort(key=lambda row: lengths[row])
    made = [tuple(order[at : at + size]) for at in range(0, len(order), size)]
    parts: dict[int, list[MicroBatch]] = {number: [rows] for number, rows in enumerate(made)}
    for number, rows, cuts in _splits(made, lengths):
        parts[number] = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    return [tuple(parts[number]) for number in range(len(made))]


def _splits(made: Sequence[MicroBatch], lengths: Sequence[int]) -> list[tuple[int, MicroBatch, list[int]]]:
    """The batches to be split, and where: the most wasteful first, until little is wasted."""

    def waste(rows: MicroBatch) -> int:
        return lengths[rows[-1]] * len(rows) - sum(lengths[row] for row in rows)

    wasted, real = sum(map(waste, made)), sum(lengths)
    heap = [(-waste(rows), number, 0, len(rows)) for number, rows in enumerate(made)]
    heapify(heap)
    cuts: dict[int, list[int]] = {}
    while wasted > MOST_PADDING * (real + wasted):
        lost, number, start, end = heappop(heap)
        rows = made[number][start:end]
        at = min(range(1, len(rows)), key=lambda n: waste(rows[:n]) + waste(rows[n:]))
        for low, high in ((start, start + at), (start + at, end)):
            part = waste(made[number][low:high])
            heappush(heap, (-part, number, low, high))
            wasted += part
        wasted += lost
        cuts.setdefault(number, []).append(start + at)
    return [(number, made[number], sorted(found)) for number, found in cuts.items()]


def in_epoch(count: int, seed: int, epoch: int) -> list[int]:
    """The order of so many batches in an epoch; the same seed and epoch give the same one."""
    order = list(range(count))
    Random(f"{seed}/{epoch}").shuffle(order)
    return order


def in_order(lengths: Sequence[int], size: int) -> list[MicroBatch]:
    """All rows once, by length, in parts of at most `size`: for evaluation, where order means nothing."""
    return [part for batch in batches(lengths, size, seed=0) for part in batch]


def held_out(count: int, share: float, seed: int, most: int = 200) -> list[int]:
    """The indices of the held-out examples: that share of them, at least 1, at most `most`."""
    wanted = min(most, max(1, round(count * share)))
    return sorted(Random(f"{seed}/held-out").sample(range(count), wanted))
