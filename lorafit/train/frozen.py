"""The layers below the cut in a run: what is done with them, tried on its first micro-batch, run once over its rows."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from signal import SIGTERM

import torch

from lorafit.data import Batch
from lorafit.errors import Interrupted, OneProcess, RequestError, RunError
from lorafit.evaluate import Evaluator
from lorafit.events import Event, Filling, PrefixCache
from lorafit.forward import (
    Choice,
    DiskStore,
    Forward,
    MemoryStore,
    Prefix,
    Sweep,
    Trial,
    base_of,
    choose,
    fill,
    first_pass,
    not_streamed,
    refusal,
    settle,
    states_folder,
    states_key,
    sweep_of,
    trained_in,
)
from lorafit.system import free_disk, free_memory
from lorafit.train.job import Job
from lorafit.train.state import State


@dataclass(slots=True)
class Frozen:
    """What is done with the layers below the cut: the `prefix` that replays them, how it is filled, and of
    streamed ones the trial."""

    prefix: Prefix = field(default_factory=Prefix)
    caching: PrefixCache = field(default_factory=lambda: PrefixCache("off", ""))
    sweep: Sweep = field(default_factory=Sweep)
    trial: Trial | None = None


def first_look(job: Job) -> tuple[Forward, Trial | None]:
    """How the model is called, and of one whose lower layers are streamed its first whole pass, unless the states
    of these layers are shared: then that pass was made.

    Raises RequestError where streaming would not be exact.
    """
    head_chunk = job.config.head_chunk or 0
    if job.streamed is None:
        forward = Forward.of(job.model, job.task, head_chunk)
        if job.sharded is not None:
            job.sharded.after_end()  # a way that it tried may have failed within the model
        return forward, None
    if not job.world.alone:
        raise not_streamed("it runs in one process")
    base, first = base_of(job.model), job.first_batch()
    assert first is not None
    if reason := refusal(job.found, job.plan.cut, trained_in(base), base, training=True):
        raise not_streamed(reason)
    shared = next(map(job.states.get, job.plan.cut.items()), None)
    if shared is not None and shared.forward is not None:
        return shared.forward, None
    forward, trials = first_pass(job.streamed, job.model, job.task, first.to(job.device), head_chunk)
    return forward, trials[0]


def prepare(job: Job, forward: Forward, held_out: Evaluator, trial: Trial | None) -> Frozen:
    """What is done with the layers below the cut. Resident ones are tried on the run's first micro-batch.

    Raises RequestError when the cache was asked for by name and would not be exact, or when streamed layers
    have no room for their states.
    """
    asked, base = job.config.prefix_cache, base_of(job.model)

    def refused(reason: str) -> Frozen:
        if asked not in ("auto", "off"):
            raise RequestError(
                f"--prefix-cache {asked} would not be exact: {reason}", "--prefix-cache auto, or off"
            )
        return Frozen(caching=PrefixCache("off", reason))

    if asked == "off" and trial is None:
        return refused("--prefix-cache off")
    if reason := refusal(job.found, job.plan.cut, trained_in(base), base, training=True):
        return refused(reason)
    ((stack, cut),) = job.plan.cut.items()
    row_bytes = job.found.hidden_size * next(job.model.parameters()).dtype.itemsize
    size = row_bytes * (_processed(job) + held_out.processed)
    place = states_folder() / states_key(base, stack, cut, _composition(job, held_out), job.fingerprint)
    # streamed layers run once, however many epochs there are
    passes = job.steps / job.steps_per_epoch if trial is None else 2.0
    choice = choose(asked, passes, size, free_memory(), free_disk(states_folder()), place.exists())
    shared = job.states.get((stack, cut))
    if shared is not None:
        choice = Choice(shared.where, "shared by all candidates whose band begins at this layer", size)
    where, reason = job.world.told([choice.where, choice.reason])
    choice = Choice(where, reason, size)
    if choice.where == "off":
        if job.streamed is not None:
            raise not_streamed(f"their output has to be kept, and is not: {choice.reason}")
        return Frozen(caching=PrefixCache("off", choice.reason))
    first = job.first_batch()
    reads = job.streamed.held if job.streamed is not None else None
    prefix, reason, state = Prefix(base.get_submodule(stack), cut, reads), "", torch.empty(0)
    if trial is not None:
        prefix = trial.prefix
    elif first is not None and job.streamed is None:
        job.model.eval()
        losses = lambda batch: forward.scores(job.model, batch)[0]  # noqa: E731
        reason, state = prefix.differs(first.to(job.device), losses, job.anybody)
        if job.sharded is not None:
            job.sharded.after_end()
            prefix.always = True
    if job.world.agreed(bool(reason)):
        return refused(reason or "another process found a replay to differ from a whole pass")
    made = {first.key: state} if first is not None and job.streamed is None else {}
    if shared is not None:  # filled already
        prefix.store, prefix.forms = shared.store, shared.forms
    elif choice.where == "disk":
        store, why = _disk_store(job, held_out, place, cut, made)
        if store is None:
            return Frozen(caching=PrefixCache("off", why))
        prefix.store = store
    else:
        prefix.store = MemoryStore(size)
        for key, kept in made.items():
            prefix.store.put(key, kept)
    sweep = _sweep(job, held_out, choice, row_bytes)
    return Frozen(
        prefix, PrefixCache(choice.where, choice.reason, cut, size, job.streamed is not None), sweep, trial
    )


def _disk_store(
    job: Job, held_out: Evaluator, place: Path, cut: int, made: Mapping[str, torch.Tensor]
) -> tuple[DiskStore | None, str]:
    """(the states' folder, with those that are `made`; why there is none, where the run goes on without). Raises
    OneProcess where it does not."""
    layers = f"layers 0–{cut - 1}" if cut > 1 else "layer 0"
    about = {"about": f"{job.found.model}, {layers}", "tokens": job.rows.look.tokens}
    store = None
    try:
        store = DiskStore(place, frozenset([*job.keys, *held_out.keys]), about)
        for key, state in made.items():
            store.put(key, state)
        return store, ""
    except OSError as error:
        if store is not None:
            with suppress(OSError):  # what is still to be written does not fit either
                store.close()
        why = f"its file cannot be written: {error.strerror}"
        if job.config.prefix_cache == "auto" and job.world.alone and job.streamed is None:
            return None, why
        raise OneProcess(
            f"the frozen-layer cache below `{states_folder()}`: {why}", "XDG_CACHE_HOME names another place"
        ) from None


def _processed(job: Job) -> int:
    """Tokens of this process's pass over the training rows, padding with them."""
    lengths = job.rows.train.lengths
    parts = ((n, part) for n, batch in enumerate(job.batches) for part in range(len(batch)))
    shares = [rows for n, part in parts if (rows := job.share(n, part))]
    return sum(len(rows) * int(lengths[list(rows)].max()) for rows in shares)


def _composition(job: Job, held_out: Evaluator) -> list[str]:
    """What the micro-batches of this process are, for the key of their states."""
    found = [job.rows.train.digest, job.rows.held_out.digest, json.dumps([job.batches, held_out.parts])]
    if not job.world.alone:
        found.append(f"process {job.world.rank} of {job.world.size}")
    return found if job.sharded is None else [*found, "at once"]


def _sweep(job: Job, held_out: Evaluator, choice: Choice, row_bytes: int) -> Sweep:
    """How the layers below the cut are gone through."""
    if job.streamed is None:
        return Sweep()
    largest = row_bytes * job.batch_size * int(job.rows.train.lengths.max())
    every = len(job.keys) + len(held_out.keys)
    return sweep_of(job.streamed, largest, job.device, every if choice.where == "memory" else 0)


def fill_prefix(
    job: Job, state: State, forward: Forward, held_out: Evaluator, frozen: Frozen
) -> Generator[Event, None, PrefixCache]:
    """Run the layers below the cut over all rows that the run will see; what became of the cache.

    Raises Interrupted when the run is to end meanwhile, RunError when the states of streamed layers cannot be
    written or a replay is not what a whole pass was; what lies on disk is gone on with.
    """
    prefix, ahead, lengths = frozen.prefix, job.ahead(state.step), job.rows.train.lengths
    trained = sum(int(lengths[list(job.share(n, part))].sum()) for n, part in ahead)
    tokens = trained + held_out.tokens
    batches = chain((job.micro_batch(n, part) for n, part in ahead), (b for _, b in held_out.batches()))
    done, why, ended, started = 0.0, "", False, time.perf_counter()
    job.model.eval()
    parts = fill([prefix], batches, partial(_run, job, forward), job.device, frozen.sweep, job.anybody)
    while not ended:
        part = None
        try:
            part = next(parts, None)
        except OSError as error:
            why = f"its file could not be written: {error.strerror}"
        if part is not None:
            done += part
            yield Filling(min(round(done), tokens - 1), tokens, time.perf_counter() - started)
        ended = job.anybody(part is None or bool(job.stop()))
    if job.world.agreed(bool(job.stop())):
        goes_on = ", and goes on with what is cached" if frozen.caching.where == "disk" else ""
        raise Interrupted(
            "interrupted before the first step",
            f"the same command begins it again{goes_on}",
            job.stop() or SIGTERM,
        )
    if why and job.streamed is not None:
        raise RunError(
            f"the frozen-layer cache: {why}", "free some space; the same command goes on with what is cached"
        )
    seconds = time.perf_counter() - started
    state.fill_seconds += seconds * trained / max(1, tokens)
    state.seconds += seconds * trained / max(1, tokens)
    if job.world.agreed(bool(why)):  # nothing is lost but time: every pass is a whole one
        prefix.give_up()
        off = PrefixCache("off", why or "another process could not write its file")
        yield off
        return off
    if frozen.trial is not None and job.streamed is not None:
        settle(job.streamed, job.model, [frozen.trial])
    yield Filling(tokens, tokens, seconds, job.streamed.read if job.streamed is not None else 0)
    return frozen.caching


def _run(job: Job, forward: Forward, batch: Batch) -> None:
    """A pass to where a stand-in ends it."""
    forward.run(job.model, batch)
    if job.sharded is not None:
        job.sharded.after_end()
