"""Layers below the cut that are read as they run: one whole pass, compared with replays once other rows went by."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lorafit.data import Batch
from lorafit.errors import RunError
from lorafit.forward.activations import base_of
from lorafit.forward.head import Forward
from lorafit.forward.placement import COMFORTABLE
from lorafit.forward.prefix import Prefix
from lorafit.forward.prefix_fill import Sweep
from lorafit.forward.prefix_store import same_state
from lorafit.forward.stand_in import Blank, Tap, in_place
from lorafit.model import Streamed, let_go
from lorafit.system import free_memory

FEW = 64  # tokens of a trial


@dataclass(slots=True)
class Trial:
    """One whole pass over a micro-batch, each block below the cut read as it ran: what entered the head, (N, D),
    and the state that entered the cut, (B, T, D)."""

    prefix: Prefix
    batch: Batch
    forward: Forward
    wanted: torch.Tensor
    state: torch.Tensor

    def differs(self, model: torch.nn.Module) -> bool:
        """Whether a replay of it gives something else, but for rounding: the same products may be summed in another
        order. Other rows went through the blocks by now, so that what a layer left behind for those above it is
        another's."""
        with self.prefix.replayed(self.state):
            found = self.forward.into_head(model, self.batch)
        return not same_state(self.wanted, found)

    def let_embedding_go(self, model: torch.nn.Module) -> None:
        """Give back the memory of an input embedding that no replay needs; one that is the head's too stays."""
        base = base_of(model)
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        if head.weight is embedding.weight or any(p.requires_grad for p in embedding.parameters()):
            return
        places = (
            (owner, name) for owner in base.modules() for name, m in owner.named_children() if m is embedding
        )
        owner, name = next(places)
        setattr(owner, name, Blank(embedding))
        if self.differs(model):
            setattr(owner, name, embedding)
        else:
            let_go(embedding)


def first_pass(
    streamed: Streamed,
    model: torch.nn.Module,
    task: str,
    batch: Batch,
    chunk: int = 0,
    above: Sequence[int] = (),
) -> tuple[Forward, list[Trial]]:
    """(how the model is called, the trials of a few tokens of that micro-batch, at the streamed layers' cut and at
    those `above` it): each block below the cut is read once."""
    base: Any = base_of(model)
    stack = base.get_submodule(streamed.stack)
    prefix, *others = (Prefix(stack, cut, streamed.held) for cut in (streamed.cut, *above))
    plain, blocks = Forward.plain(base, task), list(stack.named_children())
    taps = {blocks[other.cut][0]: Tap(blocks[other.cut][1]) for other in others}
    model.eval()
    batch = _few_of(batch)
    with ExitStack() as notes, in_place(stack, taps):
        for other in others:
            notes.enter_context(other.noting(0, other.cut))
        wanted, state = prefix.run_whole(batch, partial(plain.into_head, base))
    with prefix.replayed(None):  # its try on a few tokens needs no block below the cut
        forward = Forward.of(model, task, chunk)
    states = [state, *(tap.state for tap in taps.values())]
    return forward, [
        Trial(p, batch, plain, wanted, s) for p, s in zip((prefix, *others), states, strict=True)
    ]


def settle(streamed: Streamed, model: torch.nn.Module, trials: Sequence[Trial]) -> None:
    """After all rows ran through the streamed layers: the trials replayed, and the embedding let go where no replay
    needs it.

    Raises RunError where a replay is not what a whole pass was, or the checkpoint changed meanwhile.
    """
    streamed.check_unchanged()
    if any(trial.differs(model) for trial in trials):
        raise RunError(
            "streamed layers would not be exact: a layer above them reads them", "--prefix-residency resident"
        )
    trials[0].let_embedding_go(model)


def _few_of(batch: Batch) -> Batch:
    """The first FEW tokens of a micro-batch's first row, each of them a place to predict."""
    inputs = {name: tensor[:1, :FEW] for name, tensor in batch.inputs.items()}
    places = torch.arange(inputs["input_ids"].shape[1], device=batch.places.device)
    return replace(batch, inputs=inputs, places=places)


def sweep_of(streamed: Streamed, largest: int, device: torch.device, in_memory: int = 0) -> Sweep:
    """How streamed blocks are gone through: one at a time, by as many micro-batches as their states, of `largest`
    bytes each, have room for; by all `in_memory` of them where these are kept there anyway."""
    if in_memory and device.type != "cuda":
        return Sweep(1, in_memory, streamed.held)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return Sweep(1, max(1, int(COMFORTABLE * free / largest)), streamed.held)
