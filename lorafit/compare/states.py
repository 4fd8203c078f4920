"""The states below every cut, filled in one pass over all rows before the first candidate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from lorafit.compare.candidates import Candidate
from lorafit.compare.shared import Lasting, SharedBase
from lorafit.data import Rows
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
from lorafit.settings import RunConfig
from lorafit.system import free_disk, free_memory
from lorafit.train import Base, SharedStates, composed, every_micro_batch

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
) -> Iterator[Filling]:
    """Run the layers below the highest cut once over the training rows and those of the evaluators; the states of
    every cut are kept, for all candidates. What each candidate still lacks it fills itself.

    The states of all cuts lie in memory where they fit, else on disk, else they are made by each candidate.
    """
    base, config = shared.base, candidates[0].config
    cuts = _cuts(base, candidates)
    if not cuts:
        return
    batches = composed(rows, config, base.found.task)
    lengths = rows.train.lengths
    processed = sum(len(part) * int(lengths[list(part)].max()) for batch in batches for part in batch)
    processed += sum(each.processed for each in evaluators)
    dtype = next(base.model.parameters()).dtype
    size = base.found.hidden_size * dtype.itemsize * processed
    keys = [f"train {n}.{part}" for n, batch in enumerate(batches) for part in range(len(batch))]
    keys += [key for each in evaluators for key in each.keys]
    composition = [rows.train.digest, *(each.rows.digest for each in evaluators), json.dumps(batches)]
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
        yield from _filled(prefixes, base, rows, tokenizer, evaluators, forward, config)
    except OSError:  # the disk is full: each candidate makes its own
        shared.close()


def _filled(
    prefixes: Sequence[Prefix],
    base: Base,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    evaluators: Sequence[Evaluator],
    forward: Forward,
    config: RunConfig,
) -> Iterator[Filling]:
    """The pass itself. Raises OSError where a file cannot be written."""
    trained = every_micro_batch(rows, config, base.found.task, tokenizer)
    batches = chain(trained, (batch for each in evaluators for _, batch in each.batches()))
    tokens = rows.look.tokens + sum(each.tokens for each in evaluators)
    done, started = 0.0, time.perf_counter()
    base.model.eval()
    for part in fill(prefixes, batches, partial(forward.run, base.model), base.device):
        done += part
        yield Filling(min(round(done), tokens - 1), tokens, time.perf_counter() - started)
    yield Filling(tokens, tokens, time.perf_counter() - started)


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
