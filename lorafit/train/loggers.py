"""Who listens to a run: the events file, the model card, the report page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain

import yaml

from lorafit.adapter import write_base
from lorafit.events import Event, Started, TrainReport, record
from lorafit.outputs import CARD, EVENTS, PAGE, RUN_FILE, writing
from lorafit.report import adapter_card, make_page, read_back
from lorafit.train.job import Job
from lorafit.train.run_folder import rewind


def recorded(job: Job, events: Iterator[Event]) -> Iterator[Event]:
    """The same events, each written to `events.jsonl`; after the last, the folder is put in its place.

    A run that fails before its first checkpoint leaves nothing behind. Raises RunError where the
    disk is full.
    """
    folder = job.folder
    log_file = folder.work / EVENTS
    try:
        with writing(folder.work):
            first = next(events)  # Started: by then a resumed run is known to be the same
            rewind(log_file, first.resumed_at if isinstance(first, Started) else 0)
            run_file = yaml.safe_dump(job.config.as_file(), sort_keys=False, allow_unicode=True)
            (folder.work / RUN_FILE).write_text(run_file, encoding="utf-8")
            write_base(folder.work, job.found.model, job.fingerprint)
            with closing(log_file.open("a", encoding="utf-8", buffering=1)) as log:
                for event in chain([first], events):
                    log.write(json.dumps(record(event)) + "\n")
                    if isinstance(event, TrainReport):
                        log.close()
                        _tell(job)
                        folder.finish(job.config.keep or 0, event.best.step if event.best else None)
                    yield event
    finally:
        folder.abandon()


def _tell(job: Job) -> None:
    """The finished run for people: its card and its page."""
    run = replace(read_back(job.folder.work), folder=job.folder.target)
    card = adapter_card(job.plan, run, job.found.family, job.task)
    (job.folder.work / CARD).write_text(card, encoding="utf-8")
    name = job.folder.target.name
    shown = make_page(name, job.found, {str(job.folder.target): job.plan.modules}, [run])
    (job.folder.work / PAGE).write_text(shown, encoding="utf-8")
