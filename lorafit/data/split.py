"""Which rows of a run are held out, and how often the others are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from lorafit.data.batching import held_out
from lorafit.data.counts import Counts
from lorafit.data.rows import RowStore
from lorafit.errors import RequestError
from lorafit.settings import RunConfig


@dataclass(frozen=True, slots=True)
class ReadFile:
    """One source, read."""

    store: RowStore
    format: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class ReadData:
    """One `--data`, read."""

    spec: str
    weight: float
    parts: tuple[ReadFile, ...]

    @property
    def examples(self) -> int:
        return sum(part.counts.examples for part in self.parts)


def held_out_rows(data: Sequence[ReadData], config: RunConfig) -> list[np.ndarray]:
    """For each source whether a row is held out: a seeded share of all examples, but of a document its
    end, since a window knows its neighbours. Raises RequestError where there is nothing to part."""
    parts = [part for several in data for part in several.parts]
    kinds = [part for part in parts if part.format != "document"]
    documents = [part for part in parts if part.format == "document"]
    for part in documents:
        if len(part.store) < 2:
            raise RequestError(
                f"`{part.store.name}` is one window of {config.max_length} tokens: none can be held out",
                "a longer text, a smaller --max-length, or --eval-data",
            )
    # by number, the group of each example that has rows
    alive = [np.unique(part.store.arrays["examples"], return_index=True) for part in kinds]
    groups = [part.store.arrays["groups"][first] for part, (_, first) in zip(kinds, alive, strict=True)]
    several = sum(len(numbers) for numbers, _ in alive)
    if not documents and several < 2:
        names = ", ".join(f"`{each.spec}`" for each in data)
        if not several:
            counts = [part.counts for part in parts]
            raise RequestError(*nothing_left("training", counts, config))
        raise RequestError(
            f"{names} holds one example: none can be held out", "more examples, or --eval-data"
        )
    out = np.zeros(several, dtype=bool)
    if config.group_by:
        out = _out_by_group(np.concatenate(groups), config)
    elif several > 1:
        out[held_out(several, config.holdout, config.seed_of_data)] = True
    found, before = [], 0
    for part in parts:
        rows = len(part.store)
        if part.format == "document":
            most = max(1, round(rows * config.holdout))
            found.append(np.arange(rows) >= rows - most)
        else:
            numbers = np.unique(part.store.arrays["examples"])
            chosen = numbers[out[before : before + len(numbers)]]
            found.append(np.isin(part.store.arrays["examples"], chosen))
            before += len(numbers)
    return found


def _out_by_group(groups: np.ndarray, config: RunConfig) -> np.ndarray:
    """(examples,) whether each is held out: groups in a seeded order, until the share is reached.

    Raises RequestError where all are one group.
    """
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < 2:
        raise RequestError(
            f"--group-by {config.group_by}: all rows are one group: none can be held out", "--eval-data"
        )
    order = list(range(len(names)))
    Random(f"{config.seed_of_data}/groups").shuffle(order)
    wanted = len(held_out(len(groups), config.holdout, config.seed_of_data))
    chosen: list[int] = []
    for number in order[:-1]:  # one stays to be trained on
        if sum(int(sizes[n]) for n in chosen) >= wanted:
            break
        chosen.append(number)
    return np.isin(groups, names[chosen])


def as_often(numbers: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Each row as often as its weight says; of what is left of a weight, a seeded share once more."""
    whole, part = int(weight), weight - int(weight)
    more = sorted(Random(f"{seed}/weight").sample(range(len(numbers)), round(part * len(numbers))))
    return np.concatenate([*[numbers] * whole, numbers[more]]).astype(np.int64)


def nothing_left(which: str, counts: Sequence[Counts], config: RunConfig) -> tuple[str, str]:
    why = [
        f"{sum(c.unsupervised for c in counts):,} had nothing to learn",
        f"{sum(c.cut_away for c in counts):,} had nothing to learn in their first {config.max_length} tokens",
        f"{sum(c.too_long for c in counts):,} were longer than --max-length",
        f"{sum(c.blank for c in counts):,} were blank",
        f"{sum(c.empty for c in counts):,} had an empty answer",
        f"{sum(c.bad for c in counts):,} cannot be used",
        f"{sum(c.weightless for c in counts):,} had weight 0",
    ]
    said = ", ".join(text for text in why if not text.startswith("0 ")) or "there was none"
    return f"no {which} row is left: {said}", "raise --max-length, or look at the data"
