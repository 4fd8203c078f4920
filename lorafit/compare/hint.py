"""A hint before training: how strong the gradient is that a LoRA adapter would start from, by layer and role.

At its start an adapter's B is zero, so what moves first is B, by the gradient G A^T of the weight's gradient G (arXiv:2106.09685,
sec. 4.1). AdamW's first steps move each value of B by about the learning rate, so the loss falls by the rate times
the sum of |dL/dB|: that sum, for the values that a choice trains, ranks the choices. It is a first-order figure at the start,
and says nothing of what comes later: a hint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lorafit.adapter import Plan, inject_plan, lora_params, planned
from lorafit.compare.candidates import Candidate
from lorafit.compare.shared import SharedBase
from lorafit.data import Rows
from lorafit.errors import RequestError
from lorafit.forward import Forward, Prefix
from lorafit.model import Role
from lorafit.settings import Lora
from lorafit.train import micro_batches_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES, RANK = 4, 8  # batches that are looked at, and the rank of the adapter that is put in for it


@dataclass(frozen=True, slots=True)
class Hint:
    """`signals` has, by role, the mean |dL/dB| in each layer, None where there is no such weight or it was not
    measured; `scores` the sum over what each choice trains; `suggested` is the choice with the highest."""

    signals: Mapping[str, tuple[float | None, ...]]
    scores: Mapping[str, float]
    suggested: str


def hint_of(
    shared: SharedBase,
    candidates: Sequence[Candidate],
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    numbers: Sequence[int],
) -> Hint:
    """Measure the signal of all weights that some candidate adapts, on the first batches of those `numbers`. The base
    is left as it was.

    Raises RequestError where none of them can be measured.
    """
    base, first = shared.base, candidates[0]
    paths = list(
        dict.fromkeys(slot.path for one in candidates for slot in one.plan.slots if slot.kind != "parameter")
    )
    if not paths:
        raise RequestError("--hint measures linear layers, and the candidates adapt none")
    preset = replace(first.preset.with_modules(paths), lora=Lora(r=RANK, alpha=RANK))
    config = replace(first.config, include=(), exclude=(), stack=None)
    plan = planned(base.found, preset, config, "all")
    torch.manual_seed(0)
    model = inject_plan(base.model, plan, base.found.task)
    try:
        forward = shared.forward or Forward.of(model, base.found.task, config.head_chunk or 0)
        prefix, streamed = None, base.streamed
        if streamed is not None:
            prefix = shared.replaying(model, streamed.stack, streamed.cut)
        model.train()
        task, vocab = base.found.task, base.found.vocab_size
        for batch in micro_batches_of(rows, first.config, task, tokenizer, numbers[:BATCHES], vocab):
            batch = batch.to(base.device)
            with (prefix or Prefix()).around(batch):
                (forward.loss_sum(model, batch) / batch.weight).backward()
        found = {
            name.removeprefix("base_model.model.").rpartition(".lora_B.")[0]: float(p.grad.abs().mean())
            for name, p in model.named_parameters()
            if ".lora_B." in name and p.grad is not None
        }
    finally:
        shared.take_out(model, plan)
    scores: dict[str, float] = {}
    for one in candidates:
        scores.setdefault(one.choice, _score(one.plan, found))
    return Hint(_by_role(plan, found), scores, max(scores, key=lambda choice: scores[choice]))


def _score(plan: Plan, signals: Mapping[str, float]) -> float:
    return sum(signals.get(slot.path, 0.0) * lora_params(slot, plan.lora) for slot in plan.slots)


def _by_role(plan: Plan, signals: Mapping[str, float]) -> dict[str, tuple[float | None, ...]]:
    """The mean signal of each role in each layer of the stack that most weights lie in."""
    stacks = [slot.stack for slot in plan.slots]
    main = max(set(stacks), key=stacks.count)
    slots = [slot for slot in plan.slots if slot.stack == main]
    depth = max(slot.layer for slot in slots) + 1
    found: dict[str, tuple[float | None, ...]] = {}
    for role in Role:
        cells: list[float | None] = []
        for layer in range(depth):
            here = [
                signals[s.path] for s in slots if role in s.roles and s.layer == layer and s.path in signals
            ]
            cells.append(sum(here) / len(here) if here else None)
        if any(cell is not None for cell in cells):
            found[role.value] = tuple(cells)
    return found
