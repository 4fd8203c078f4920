"""The frozen prefix, run once over every micro-batch, before the first step: what enters the cut is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from lorafit.data import Batch
from lorafit.forward.prefix import Anybody, Held, Prefix
from lorafit.forward.stand_in import End, StandIn, Tap, in_place


@dataclass(frozen=True, slots=True)
class Sweep:
    """How the blocks are gone through: `blocks` at a time (0: all of them), each time by `group` micro-batches;
    they hold their weights within `held`."""

    blocks: int = 0
    group: int = 1
    held: Held = lambda first, last: nullcontext()


def fill(
    prefixes: Sequence[Prefix],
    batches: Iterable[Batch],
    run: Callable[[Batch], None],
    device: torch.device,
    sweep: Sweep = Sweep(),
    anybody: Anybody = bool,
) -> Iterator[float]:
    """Run each micro-batch once through the blocks below the highest cut: each prefix of one stack stores the
    states that enter its own cut. Yields tokens as they are done, one that ran through a part of the blocks
    counted as that part.

    `run` runs the model's own forward, which a stand-in may end. Those whose states are stored are not run, unless
    `anybody` lacks the one that comes as many.
    Raises OSError where a store's disk is full.
    """
    left = iter(batches)
    while group := list(islice(left, sweep.group if all(p.store.proved for p in prefixes) else 1)):
        stored = [not anybody(not all(prefix.store.has(batch.key) for prefix in prefixes)) for batch in group]
        wanted = [batch.to(device) for batch, there in zip(group, stored, strict=True) if not there]
        yield sum(batch.tokens for batch, there in zip(group, stored, strict=True) if there)
        if wanted:
            yield from _fill_group(prefixes, wanted, run, sweep)
    for prefix in prefixes:
        prefix.store.filled()


@torch.no_grad()
def _fill_group(
    prefixes: Sequence[Prefix], group: Sequence[Batch], run: Callable[[Batch], None], sweep: Sweep
) -> Iterator[float]:
    """All blocks for a group: it holds one state for each of its micro-batches. Yields as `fill` does."""
    top = max(prefix.cut for prefix in prefixes)
    states: list[torch.Tensor | None] = [None] * len(group)
    for first in range(0, top, sweep.blocks or top):
        last = min(top, first + (sweep.blocks or top))
        with sweep.held(first, last):
            for number, batch in enumerate(group):
                state = states[number]
                entering = _entering(prefixes, first, last, state, partial(run, batch))
                for prefix in prefixes:
                    if prefix.cut in entering:
                        prefix.store.put(batch.key, entering[prefix.cut])
                states[number] = entering[last]
                yield batch.tokens * (last - first) / top


def _entering(
    prefixes: Sequence[Prefix], first: int, last: int, state: torch.Tensor | None, run: Callable[[], None]
) -> dict[int, torch.Tensor]:
    """The states that enter the blocks of the cuts after `first`, and block `last`, where the pass ends. The
    blocks below `first` hand on the state."""
    top = max(prefixes, key=lambda prefix: prefix.cut)
    assert top.stack is not None
    blocks = list(top.blocks.items())
    taps: dict[int, Tap | End] = {
        prefix.cut: Tap(blocks[prefix.cut][1]) for prefix in prefixes if first < prefix.cut < last
    }
    taps[last] = End(blocks[last][1])
    stand_ins: dict[str, StandIn] = {blocks[cut][0]: tap for cut, tap in taps.items()}
    with ExitStack() as stack:
        for prefix in prefixes:
            stack.enter_context(prefix.noting(first, min(last, prefix.cut)))
        stack.enter_context(top.replayed(state, first))
        stack.enter_context(in_place(top.stack, stand_ins))
        run()
    return {cut: tap.state for cut, tap in taps.items()}
