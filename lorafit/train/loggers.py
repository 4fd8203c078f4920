"""Who listens to a run: the events file, the model card, the report page; a screen or a tracker beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import methodcaller
from typing import Any, Protocol

import yaml

from lorafit.adapter import save_tokenizer, write_base
from lorafit.data import end_tokens, save_rows, write_generation_config
from lorafit.events import Compiling, Event, Filling, Note, Started, TrainReport, record
from lorafit.outputs import CARD, EVENTS, HELD_OUT, PAGE, RUN_FILE, writing
from lorafit.report import adapter_card, make_page, read_back
from lorafit.train.job import Job
from lorafit.train.run_folder import rewind


class Listener(Protocol):
    """Something that a run's events go to. One that raises gets no more of them; the run goes on."""

    def start(self, run: Started, settings: Mapping[str, Any]) -> None:
        """Called once, before any event; `settings` are those of the run file."""
        ...

    def on(self, event: Event) -> None:
        """Called with each event, `Started` the first and `TrainReport` the last of a run that finishes."""
        ...

    def close(self, failed: bool) -> None:
        """Called once, at the end, whether the run finished or failed."""
        ...


class EventLog:
    """`events.jsonl`: a line an event. A resumed run's is cut to what its checkpoint holds."""

    def __init__(self, job: Job) -> None:
        self.path = job.folder.work / EVENTS

    def start(self, run: Started, settings: Mapping[str, Any]) -> None:
        rewind(self.path, run.resumed_at)

    def on(self, event: Event) -> None:
        if isinstance(event, Filling) and event.done < event.tokens:
            return
        if isinstance(event, Compiling) and not event.done:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record(event)) + "\n")

    def close(self, failed: bool) -> None:
        """Nothing is open: the folder may be renamed."""


class ModelCard:
    """`README.md` beside the adapter, once the run has finished."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def start(self, run: Started, settings: Mapping[str, Any]) -> None:
        """Nothing is written before the end."""

    def on(self, event: Event) -> None:
        if isinstance(event, TrainReport):
            job, run = self.job, replace(read_back(self.job.folder.work), folder=self.job.folder.target)
            card = adapter_card(job.plan, run, job.found.family, job.task)
            (job.folder.work / CARD).write_text(card, encoding="utf-8")

    def close(self, failed: bool) -> None:
        """Nothing is open."""


class ReportPage:
    """`report.html`: the run as a page, once it has finished."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def start(self, run: Started, settings: Mapping[str, Any]) -> None:
        """Nothing is written before the end."""

    def on(self, event: Event) -> None:
        if isinstance(event, TrainReport):
            job, target = self.job, self.job.folder.target
            run = replace(read_back(job.folder.work), folder=target)
            shown = make_page(target.name, job.found, {str(target): job.plan.modules}, [run])
            (job.folder.work / PAGE).write_text(shown, encoding="utf-8")

    def close(self, failed: bool) -> None:
        """Nothing is open."""


def records(job: Job) -> list[Listener]:
    """What every run writes into its folder, the events first: the others read them back."""
    return [EventLog(job), ModelCard(job), ReportPage(job)]


def recorded(
    job: Job, events: Iterator[Event], listeners: Sequence[Listener] | None = None
) -> Iterator[Event]:
    """The same events, each given to the listeners (`records(job)` unless others are named) first; after
    the last, the folder is put in its place.

    A listener that fails is left out from there on, with a Note. A run that fails before its first
    checkpoint leaves nothing behind. Raises RunError where the folder cannot be written.
    """
    folder, active = job.folder, list(records(job) if listeners is None else listeners)
    failed = True
    try:
        with writing(folder.work):
            first = next(events)  # Started: by then a resumed run is known to be the same
            assert isinstance(first, Started)
            settings = job.config.as_file()
            whole = {**settings, "environment": first.environment}
            run_file = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
            draft = folder.work / f".{RUN_FILE}"  # a resumed run's file is whole at any moment
            draft.write_text(run_file, encoding="utf-8")
            draft.replace(folder.work / RUN_FILE)
            # the form of the turns, and the token that ends an answer: checkpoints are used with them
            names = save_tokenizer(job.tokenizer, folder.work)
            write_base(folder.work, job.found.model, job.fingerprint, job.config.quantize, names)
            write_generation_config(folder.work, ends=end_tokens(job.tokenizer))
            save_rows(job.rows.held_out, folder.work / HELD_OUT)
            notes = _tell(active, lambda listener: listener.start(first, settings))
            for event in chain([first], notes, events):
                passed_on = _pass_on(active, event)
                if isinstance(event, TrainReport):
                    beside = event.best if event.best and event.best.step != event.adapter_step else None
                    folder.finish(job.config.keep or 0, beside.step if beside else None)
                    failed = False
                yield from passed_on
    finally:
        _tell(active, lambda listener: listener.close(failed))
        folder.abandon()


def _pass_on(listeners: list[Listener], event: Event) -> list[Event]:
    """Give an event to all listeners, and a Note to the rest where one fails: all that they were given."""
    given: list[Event] = [event]
    for each in given:  # which grows with the notes
        given += _tell(listeners, methodcaller("on", each))
    return given


def _tell(listeners: list[Listener], call: Callable[[Listener], None]) -> list[Note]:
    """Call each listener; one that fails is removed, and a Note says so."""
    notes = []
    for listener in list(listeners):
        try:
            call(listener)
        except Exception as error:  # a page, a card or a tracker must not lose a run
            listeners.remove(listener)
            text = str(error).strip().splitlines()
            why = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
            name = getattr(listener, "name", type(listener).__name__)
            notes.append(Note(f"{name} failed and is left out from here on: {why}"))
    return notes
