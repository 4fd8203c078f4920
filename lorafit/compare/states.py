"""The states below every cut, filled in one pass over all rows before the first candidate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from lorafit.compare.candidates import Candidate
from lorafit.compare.shared import Lasting, SharedBase
from lorafit.data import Batch, MicroBatch, Rows, in_epoch
from lorafit.errors import RunError
from lorafit.evaluate import Evaluator
from lorafit.events import Filling
from lorafit.forward import (
    DiskStore,
    Forward,
    MemoryStore,
    Prefix,
    StateStore,
    Sweep,
    Trial,
    choose,
    fill,
    first_pass,
    not_streamed,
    refusal,
    settle,
    states_folder,
    states_key,
    sweep_of,
)
from lorafit.settings import RunConfig
from lorafit.system import free_disk, free_memory
from lorafit.train import Base, SharedStates, composed, micro_batches_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cut = tuple[str, int]


@dataclass(frozen=True)
class Passing:
    """The rows that run through the lower layers: of training the batches of these `numbers`, and all held-out ones."""

    rows: Rows
    config: RunConfig
    task: str
    tokenizer: PreTrainedTokenizerBase
    numbers: Sequence[int]
    evaluators: Sequence[Evaluator]

    @cached_property
    def batches(self) -> list[tuple[MicroBatch, ...]]:
        return composed(self.rows, self.config, self.task)

    @property
    def keys(self) -> list[str]:
        """Of all micro-batches."""
        made = self.batches
        trained = [f"train {n}.{part}" for n in self.numbers for part in range(len(made[n]))]
        return trained + [key for each in self.evaluators for key in each.keys]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each micro-batch of training, padding with them."""
        lengths, made = self.rows.train.lengths, self.batches
        return [len(p) * int(lengths[list(p)].max()) for number in self.numbers for p in made[number]]

    @property
    def processed(self) -> int:
        """Tokens of all micro-batches, padding with them."""
        return sum(self.sizes) + sum(each.processed for each in self.evaluators)

    @property
    def tokens(self) -> int:
        lengths, made = self.rows.train.lengths, self.batches
        trained = sum(int(lengths[list(part)].sum()) for number in self.numbers for part in made[number])
        return trained + sum(each.tokens for each in self.evaluators)

    @property
    def composition(self) -> list[str]:
        """What the micro-batches are, for the key of their states."""
        held_out = (each.rows.digest for each in self.evaluators)
        return [self.rows.train.digest, *held_out, json.dumps([self.batches, self.numbers])]

    def micro_batches(self) -> Iterator[Batch]:
        yield from micro_batches_of(self.rows, self.config, self.task, self.tokenizer, self.numbers, 0)
        for each in self.evaluators:
            yield from (batch for _, batch in each.batches())


def fill_all(
    shared: SharedBase, candidates: Sequence[Candidate], passing: Passing, forward: Forward
) -> Iterator[Filling]:
    """Run the layers below the highest cut once over the rows; the states of every cut are kept, for all candidates.

    The states of all cuts lie in memory where they fit, else on disk, else they are made by each candidate. Raises
    RequestError or RunError where layers are streamed, and their states cannot be kept or would not be exact.
    """
    base, cuts = shared.base, _cuts(shared.base, candidates)
    if not cuts:
        if base.streamed is not None:
            raise not_streamed("a replay would not be exact for any candidate")
        return
    token = base.found.hidden_size * next(base.model.parameters()).dtype.itemsize
    size, keys, composition = token * passing.processed, passing.keys, passing.composition
    places = {
        cut: states_folder() / states_key(base.model, *cut, composition, base.fingerprint) for cut in cuts
    }
    there = all(place.exists() for place in places.values())
    disk, asked = free_disk(states_folder()), passing.config.prefix_cache
    choice = choose(asked, 2, size * len(cuts), free_memory(), disk, there)
    where = choice.where
    if where == "off":
        if base.streamed is not None:
            raise not_streamed(f"their output has to be kept, and is not: {choice.reason}")
        return
    trials, sweep = _trials(shared, cuts, passing), Sweep()
    if base.streamed is not None:
        in_memory = len(keys) if where == "memory" else 0
        sweep = sweep_of(base.streamed, token * max(passing.sizes), base.device, in_memory)
    prefixes = []
    try:
        for stack, cut in cuts:
            store: StateStore = MemoryStore(size)
            if where == "disk":
                about = {
                    "about": f"{base.found.model}, layers 0–{cut - 1}",
                    "tokens": passing.rows.look.tokens,
                }
                store = DiskStore(places[stack, cut], frozenset(keys), about)
            prefix = trials[cut].prefix if trials else Prefix.below(base.model, stack, cut)
            prefix.store = Lasting(store)
            shared.states[stack, cut] = SharedStates(prefix.store, where, prefix.forms, shared.forward)
            prefixes.append(prefix)
        yield from _filled(prefixes, base, passing, shared.forward or forward, sweep)
    except OSError as error:  # the disk is full: each candidate makes its own
        shared.close()
        if base.streamed is not None:
            raise RunError(
                f"the frozen-layer cache: its file could not be written: {error.strerror}",
                "free some space; the same command goes on with what is cached",
            ) from None
    if base.streamed is not None:
        settle(base.streamed, base.model, list(trials.values()))
        shared.changed()  # its embedding is gone


def _trials(shared: SharedBase, cuts: Sequence[Cut], passing: Passing) -> dict[int, Trial]:
    """By cut, a whole pass of a base with streamed layers over the first micro-batch; nothing where all are held."""
    base = shared.base
    if base.streamed is None:
        return {}
    first = next(passing.micro_batches()).to(base.device)
    above, chunk = [cut for _, cut in cuts if cut > base.streamed.cut], passing.config.head_chunk or 0
    shared.forward, trials = first_pass(base.streamed, base.model, passing.task, first, chunk, above)
    return {trial.prefix.cut: trial for trial in trials}


def _filled(
    prefixes: Sequence[Prefix], base: Base, passing: Passing, forward: Forward, sweep: Sweep
) -> Iterator[Filling]:
    """The pass itself. Raises OSError where a file cannot be written."""
    done, started, tokens = 0.0, time.perf_counter(), passing.tokens
    base.model.eval()
    run = partial(forward.run, base.model)
    for part in fill(prefixes, passing.micro_batches(), run, base.device, sweep):
        done += part
        yield Filling(min(round(done), tokens - 1), tokens, time.perf_counter() - started)
    yield Filling(tokens, tokens, time.perf_counter() - started)


def needed(candidates: Sequence[Candidate], steps: Mapping[str, int], count: int) -> list[int]:
    """The numbers of the batches that at least one candidate trains on, out of `count`: a short run skips some."""
    found: set[int] = set()
    for one in candidates:
        taken, epoch = steps[one.name] * one.config.accumulate, 0
        while taken > 0 and len(found) < count:
            epoch += 1
            found.update(in_epoch(count, one.config.seed, epoch)[:taken])
            taken -= count
    return sorted(found)


def _cuts(base: Base, candidates: Sequence[Candidate]) -> list[Cut]:
    """The cuts whose states may be replayed exactly, each once, that a candidate uses."""
    if all(one.config.prefix_cache == "off" for one in candidates):
        return []
    found: dict[Cut, None] = {}
    for one in candidates:
        names = [*one.plan.modules, *one.plan.lora.modules_to_save]
        if len(one.plan.cut) == 1 and not refusal(base.found, one.plan.cut, names, base.model, training=True):
            ((stack, cut),) = one.plan.cut.items()
            found[stack, cut] = None
    return sorted(found)
