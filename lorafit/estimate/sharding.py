"""What dividing the base among processes changes: the memory of one, and the bytes that they exchange.

Blocks and an input embedding of its own are divided, as model/sharded.py does it. While a block runs it is whole,
and the next one is on its way or the last one's buffer still there: two of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from lorafit.adapter import Plan
from lorafit.estimate.streaming import layer_params
from lorafit.estimate.terms import ITEMSIZE, Memory, Profile, Shape, Timing, Work
from lorafit.model import ModelMap


@dataclass(frozen=True, slots=True)
class Divided:
    """Bytes of the base that a process holds, that it has whole at the peak of a step, and that it receives for a
    micro-batch: with all layers, and with the frozen ones cached."""

    held: int
    gathered: int
    received: int
    received_replayed: int


def divided(found: ModelMap, plan: Plan, shape: Shape, profile: Profile, processes: int) -> Divided:
    """The bytes of a base that `processes` share: what one holds, gathers and receives."""
    item = ITEMSIZE.get(shape.dtype, 4)
    blocks = {stack.path: layer_params(found, stack.path) for stack in found.text_stacks}
    tables = [
        u.params for u in found.uncovered if u.reason == "embedding" and u.shape[:1] == (found.vocab_size,)
    ]
    shared = found.tied_head or found.task == "seq2seq"  # used elsewhere too, so whole
    embedding = 0 if shared else max(tables, default=0)
    every = sum(map(sum, blocks.values()))
    # backward goes through the blocks from the cut up, and there they are gathered again
    above = sum(sum(blocks[path][cut:]) for path, cut in plan.cut.items() if path in blocks)
    largest = max(max(each, default=0) for each in blocks.values()) if blocks else 0
    # the embedding is whole before there is anything else
    early = 2 * embedding * item - profile.activations - profile.logits - profile.workspace
    others = (processes - 1) / processes
    return Divided(
        held=(found.total_params - every - embedding) * item + ceil((every + embedding) / processes) * item,
        gathered=max(2 * largest * item, early),
        received=round(others * item * (embedding + every + above)),
        received_replayed=round(others * item * (embedding + 2 * above)),
    )


def on_each(
    base: Divided,
    memory: Memory,
    timing: Timing,
    shape: Shape,
    work: Work | None,
    processes: int,
    link: float,
) -> tuple[Memory, Timing]:
    """The memory of one process, and the timing with what the gathering adds to a token, at `link` bytes a
    second. A large tensor is given back to the system once it is freed, so there is no overhead of the heap."""
    tokens = float(shape.tokens)
    if work is not None:
        tokens = work.tokens / processes / (work.epoch_steps * shape.accumulate)
    timing = replace(
        timing,
        token=timing.token + base.received / link / tokens,
        token_replayed=timing.token_replayed + base.received_replayed / link / tokens,
    )
    return replace(memory, weights=base.held, gathered=base.gathered, heap=0), timing
