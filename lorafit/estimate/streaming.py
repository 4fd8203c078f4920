"""What streaming the layers below the band changes: memory, bytes read, seconds."""

from __future__ import annotations

import re
from dataclasses import replace
from math import ceil

from lorafit.adapter import Plan
from lorafit.estimate.formulas import widest
from lorafit.estimate.terms import ITEMSIZE, Memory, Residency, Shape, Work
from lorafit.forward import COMFORTABLE, Choice, refused_by_map
from lorafit.model import ModelMap


def layer_params(found: ModelMap, stack: str) -> list[int]:
    """The parameters of each block of a stack."""
    counts = [0] * found.stack(stack).depth
    for slot in found.slots:
        if slot.stack == stack and not slot.shared_with:
            counts[slot.layer] += slot.params
    block = re.compile(re.escape(stack) + r"\.(\d+)\.")
    for row in found.uncovered:
        if inside := block.match(row.path):
            counts[int(inside[1])] += row.params
    return counts


def not_streamable(found: ModelMap, plan: Plan, shape: Shape, processes: int, refusal: str) -> str:
    """Why the layers below the band of that plan cannot be streamed; empty where they can. `refusal` is why they
    cannot be cached exactly, if so."""
    if reason := refused_by_map(found, plan.cut):
        return reason
    if shape.quantize != "none" or found.quantised is not None:
        return "the base is quantised"
    if processes > 1:
        return "it runs in one process"
    return refusal


def streamed(
    memory: Memory, plan: Plan, found: ModelMap, shape: Shape, work: Work | None, cache: Choice, free: int
) -> tuple[Memory, Residency]:
    """The memory of a step once the layers below the band are let go, and what filling the cache takes above
    it; what is read.

    While it is filled, one block is held, with all that is not a block below the band, and the states of a group
    of micro-batches: all of them where they are kept in memory.
    """
    ((stack, cut),) = plan.cut.items()
    below, item = layer_params(found, stack)[:cut], ITEMSIZE.get(shape.dtype, 4)
    stored = ITEMSIZE.get(found.dtype, item)
    rest = found.total_params - sum(below)
    # an embedding that is not the head's is read in the frozen layers alone
    tables = [
        u.params for u in found.uncovered if u.reason == "embedding" and u.shape[:1] == (found.vocab_size,)
    ]
    embedding = 0 if found.tied_head else max(tables, default=0)
    state = found.hidden_size * item * shape.tokens
    groups, held = 1, cache.bytes if cache.where == "memory" else 0
    if cache.where == "disk" and work is not None:
        each = max(1, int(COMFORTABLE * free / state))
        micro_batches = work.epoch_steps * shape.accumulate + ceil(work.held_out_tokens / shape.tokens)
        groups = ceil(micro_batches / each)
        held = min(cache.bytes, each * state)
    made = replace(memory, weights=(rest - embedding) * item)
    # a block is there as it is stored, too, where its dtype or its layout is another
    copies = item + (stored if stored != item or plan_has_experts(found, stack) else 0)
    passing = shape.tokens * item * (4 * found.hidden_size + 3 * widest(found))
    filling = rest * item + max(below, default=0) * copies + passing + held + state + memory.adapter
    made = replace(made, filling=max(0, filling - made.peak))
    reads = 1 + groups
    return made, Residency("stream", "", rest * stored + reads * sum(below) * stored, reads)


def plan_has_experts(found: ModelMap, stack: str) -> bool:
    """Whether blocks of a stack hold experts in one tensor, which checkpoints hold one by one."""
    return any(slot.copies > 1 for slot in found.slots if slot.stack == stack)
