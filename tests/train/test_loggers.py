"""Who listens to a run: each hears all of it, and one that fails costs the run nothing."""

import json

import pytest
from jobs import events_of, job_for

from lorafit.errors import RunError
from lorafit.events import Note, Started, Stepped, TrainReport
from lorafit.train.loggers import recorded, records
from lorafit.train.loop import run


class Ear:
    """A listener that keeps what it hears, and fails where it is told to."""

    def __init__(self, fails=""):
        self.fails, self.heard, self.closed, self.settings = fails, [], [], {}

    def start(self, started, settings):
        self.settings = dict(settings)
        if self.fails == "start":
            raise OSError("no room")

    def on(self, event):
        self.heard.append(event)
        if self.fails == type(event).__name__:
            raise ValueError("no such run\nand more")

    def close(self, failed):
        self.closed.append(failed)
        if self.fails == "close":
            raise RuntimeError("gone")


@pytest.mark.parametrize("fails", ["start", "Started", "Stepped", "TrainReport", "close"])
def test_a_listener_that_fails_is_left_out_and_the_run_is_whole(tiny, pairs, tmp_path, fails):
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=3)
    bad, good = Ear(fails), Ear()
    events = list(recorded(job, run(job), [*records(job), bad, good]))
    assert [e for e in events if isinstance(e, TrainReport)] and (tmp_path / "r" / "report.html").is_file()
    assert good.heard == events and good.closed == [False]
    assert good.settings["max_steps"] == 3 and isinstance(good.heard[0], Started)
    lines = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert len(lines) == len(events)
    notes = [e.text for e in events if isinstance(e, Note)]
    if fails == "close":
        assert not notes and bad.closed == [False]
    else:
        assert len(notes) == 1 and "Ear failed and is left out" in notes[0] and "and more" not in notes[0]
        assert not bad.closed and len(bad.heard) < len(events)


def test_a_card_that_cannot_be_drawn_costs_the_card(tiny, pairs, tmp_path, monkeypatch):
    from lorafit.train import loggers

    def fail(*_):
        raise KeyError("loss")

    monkeypatch.setattr(loggers, "adapter_card", fail)
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=2)
    events = events_of(job)
    assert (tmp_path / "r" / "report.html").is_file() and not (tmp_path / "r" / "README.md").exists()
    assert any("ModelCard failed" in e.text for e in events if isinstance(e, Note))


def test_a_run_that_fails_closes_them_as_failed(tiny, pairs, tmp_path):
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=3)
    ear = Ear()
    with pytest.raises(RunError):
        for event in recorded(job, run(job), [ear]):
            if isinstance(event, Stepped):
                job.parameters[0].data.fill_(float("nan"))
    assert ear.closed == [True]
