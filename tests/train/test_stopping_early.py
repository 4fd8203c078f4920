"""Stopping early, and which adapter a finished run's folder holds."""

import json

import pytest
import torch
from jobs import events_of, job_for
from safetensors.torch import load_file

from lorafit.adapter.folder import WEIGHTS
from lorafit.errors import Interrupted
from lorafit.events import Evaluated, Note, Stepped
from lorafit.train import recorded, run

# too high a rate: the held-out loss soon rises
FLAGS = {"epochs": 6, "batch_size": 4, "eval_steps": 3, "learning_rate": 0.2, "scheduler": "constant"}


def trained(tiny, pairs, output, **flags):
    return events_of(job_for(tiny("llama"), output, data=(str(pairs),), **{**FLAGS, **flags}))


def evaluated(events):
    """{step: held-out loss} of the evaluations after the first step."""
    return {e.step: e.loss for e in events if isinstance(e, Evaluated) and e.step}


def test_the_folder_holds_the_best_adapter_and_says_its_step(tiny, pairs, tmp_path):
    events = trained(tiny, pairs, tmp_path / "best")
    losses, report = evaluated(events), events[-1]
    best = min(losses, key=losses.get)
    assert best < report.steps == max(losses) and report.adapter_step == report.best.step == best
    assert report.eval["after"].loss == losses[best] and report.eval["last"].loss == losses[report.steps]
    assert not list((tmp_path / "best").glob("checkpoint-*")), "it is in the folder itself"
    kept = trained(tiny, pairs, tmp_path / "last", keep_last=True)[-1]
    assert kept.adapter_step == kept.steps and kept.eval["after"].loss == losses[report.steps]
    assert "last" not in kept.eval and kept.best.step == best
    beside = tmp_path / "last" / f"checkpoint-{best}" / WEIGHTS
    assert (tmp_path / "best" / WEIGHTS).read_bytes() == beside.read_bytes()
    assert (tmp_path / "last" / WEIGHTS).read_bytes() != beside.read_bytes()
    said = f"step {best}, the best of {report.steps}"
    for name in ("report.html", "README.md"):
        assert said in (tmp_path / "best" / name).read_text()
        assert said not in (tmp_path / "last" / name).read_text()


def test_the_lowest_loss_so_far_is_marked(tiny, pairs, tmp_path):
    lowest = float("inf")
    for event in trained(tiny, pairs, tmp_path / "r"):
        if isinstance(event, Evaluated) and event.step:
            assert event.best == (event.loss < lowest)
            lowest = min(lowest, event.loss)


@pytest.mark.parametrize("patience, least", [(1, 0.0), (2, 0.0), (2, 10.0)])
def test_patience_ends_the_run(tiny, pairs, tmp_path, patience, least):
    whole = evaluated(trained(tiny, pairs, tmp_path / "whole"))
    events = trained(tiny, pairs, tmp_path / "r", patience=patience, min_delta=least)
    report, before = events[-1], next(e.loss for e in events if isinstance(e, Evaluated))
    waited, reached = 0, before
    for step, loss in whole.items():
        reached, waited = (loss, 0) if loss < reached - least else (reached, waited + 1)
        if waited == patience:
            end = step
            break
    assert report.steps == end < max(whole) and max(evaluated(events)) == end
    assert evaluated(events) == {n: loss for n, loss in whole.items() if n <= end}, "none is done twice"
    assert sum(e.tokens for e in report.epochs) == report.tokens
    assert any(f"stopped after step {end} of" in e.text for e in events if isinstance(e, Note))
    lines = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "report" and lines[-1]["adapter_step"] == min(
        evaluated(events), key=evaluated(events).get
    )


def test_a_resumed_run_waits_on(tiny, pairs, tmp_path):
    straight = trained(tiny, pairs, tmp_path / "a", patience=3)[-1]
    seen, flags = [], {**FLAGS, "data": (str(pairs),), "patience": 3}
    stop_at = straight.steps - 2
    job = job_for(tiny("llama"), tmp_path / "b", stop=lambda: 2 if len(seen) >= stop_at - 1 else 0, **flags)
    with pytest.raises(Interrupted):
        for event in recorded(job, run(job)):
            seen += [event] if isinstance(event, Stepped) else []
    resumed = events_of(job_for(tiny("llama"), tmp_path / "b", resume=True, **flags))[-1]
    assert (resumed.steps, resumed.adapter_step) == (straight.steps, straight.adapter_step)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_a_best_checkpoint_that_is_damaged_leaves_the_last(tiny, pairs, tmp_path):
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), **FLAGS)
    events = []
    for event in recorded(job, run(job)):
        events.append(event)
        if isinstance(event, Evaluated) and event.step == job.steps:
            for path in (tmp_path / "r.partial").glob("checkpoint-*/parameters.safetensors"):
                path.write_bytes(b"")
    assert any("the last adapter is saved, not the best" in e.text for e in events if isinstance(e, Note))
    assert events[-1].adapter_step == events[-1].steps
    saved = load_file(tmp_path / "r" / WEIGHTS).values()
    assert all(any(torch.equal(p, t) for t in saved) for p in job.parameters)


def test_what_the_command_shows_and_refuses(tiny, pairs, tmp_path, run):
    words = ["train", tiny("llama"), "--data", pairs, "-o", tmp_path / "r", "--epochs", 6, "--batch-size", 4]
    words += ["--learning-rate", 0.2, "--scheduler", "constant"]
    for wrong, named in (
        (("--patience", 2), "--eval-steps"),
        (("--eval-steps", 3, "--min-delta", 0.1), "--patience"),
    ):
        done = run(*words, *wrong)
        assert done.code == 2 and named in done.err
    done = run(*words, "--eval-steps", 3, "--patience", 2)
    assert done.code == 0 and "(best)" in done.err and "stopped after step" in done.err
    noted = " ".join(run("eval", tmp_path / "r", "--samples", 0).out.split())
    assert "is the adapter of step" in noted
    assert "the best of" in done.out and "not saved" in done.out and "checkpoint-" not in done.err + done.out
