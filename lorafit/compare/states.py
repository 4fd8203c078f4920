"""The states below every cut, filled in one pass over all rows before the first candidate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from lorafit.compare.candidates import Candidate
from lorafit.compare.shared import Lasting, SharedBase
from lorafit.data import Batch, Rows, in_epoch
from lorafit.evaluate import Evaluator
from lorafit.events import Filling
from lorafit.forward import (
    DiskStore,
    Forward,
    MemoryStore,
    Prefix,
    StateStore,
    choose,
    fill,
    refusal,
    states_folder,
    states_key,
)
from lorafit.system import free_disk, free_memory
from lorafit.train import Base, SharedStates, composed, micro_batches_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cut = tuple[str, int]


def fill_all(
    shared: SharedBase,
    candidates: Sequence[Candidate],
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    evaluators: Sequence[Evaluator],
    forward: Forward,
    steps: Mapping[str, int],
) -> Iterator[Filling]:
    """Run the layers below the highest cut once over the rows that some candidate trains on in its `steps`, and over
    those of the evaluators; the states of every cut are kept, for all candidates.

    The states of all cuts lie in memory where they fit, else on disk, else they are made by each candidate.
    """
    base, config = shared.base, candidates[0].config
    cuts = _cuts(base, candidates)
    if not cuts:
        return
    batches = composed(rows, config, base.found.task)
    numbers = _needed(candidates, steps, len(batches))
    parts = [part for number in numbers for part in batches[number]]
    lengths = rows.train.lengths
    processed = sum(len(part) * int(lengths[list(part)].max()) for part in parts)
    processed += sum(each.processed for each in evaluators)
    dtype = next(base.model.parameters()).dtype
    size = base.found.hidden_size * dtype.itemsize * processed
    keys = [f"train {n}.{part}" for n in numbers for part in range(len(batches[n]))]
    keys += [key for each in evaluators for key in each.keys]
    composition = [
        rows.train.digest,
        *(each.rows.digest for each in evaluators),
        json.dumps([batches, numbers]),
    ]
    places = {
        cut: states_folder() / states_key(base.model, *cut, composition, base.fingerprint) for cut in cuts
    }
    there = all(place.exists() for place in places.values())
    disk = free_disk(states_folder())
    where = choose(config.prefix_cache, 2, size * len(cuts), free_memory(), disk, there).where
    if where == "off":
        return
    prefixes = []
    for stack, cut in cuts:
        store: StateStore = MemoryStore(size)
        if where == "disk":
            about = {"about": f"{base.found.model}, layers 0–{cut - 1}", "tokens": rows.look.tokens}
            store = DiskStore(places[stack, cut], frozenset(keys), about)
        states = SharedStates(Lasting(store), where)
        shared.states[stack, cut] = states
        prefix = Prefix.below(base.model, stack, cut)
        prefix.store, prefix.forms = states.store, states.forms
        prefixes.append(prefix)
    try:
        trained = micro_batches_of(rows, config, base.found.task, tokenizer, numbers)
        held_out = (batch for each in evaluators for _, batch in each.batches())
        tokens = sum(int(lengths[list(part)].sum()) for part in parts) + sum(
            each.tokens for each in evaluators
        )
        yield from _filled(prefixes, base, chain(trained, held_out), tokens, forward)
    except OSError:  # the disk is full: each candidate makes its own
        shared.close()


def _filled(
    prefixes: Sequence[Prefix], base: Base, batches: Iterable[Batch], tokens: int, forward: Forward
) -> Iterator[Filling]:
    """The pass itself. Raises OSError where a file cannot be written."""
    done, started = 0.0, time.perf_counter()
    base.model.eval()
    for part in fill(prefixes, batches, partial(forward.run, base.model), base.device):
        done += part
        yield Filling(min(round(done), tokens - 1), tokens, time.perf_counter() - started)
    yield Filling(tokens, tokens, time.perf_counter() - started)


def _needed(candidates: Sequence[Candidate], steps: Mapping[str, int], count: int) -> list[int]:
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


def replaying(shared: SharedBase, model: object, cut: Mapping[str, int]) -> Prefix | None:
    """The prefix that hands on the shared states of that cut; None where there are none."""
    if len(cut) != 1:
        return None
    ((stack, lowest),) = cut.items()
    states = shared.states.get((stack, lowest))
    if states is None:
        return None
    prefix = Prefix.below(model, stack, lowest)  # type: ignore[arg-type]
    prefix.store, prefix.forms = states.store, states.forms
    return prefix
