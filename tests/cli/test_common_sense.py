"""What a person expects without reading: no held-out rows, parts of an epoch, too little memory."""

import json

import pytest
import yaml
from jobs import events_of, job_for
from safetensors.torch import load_file

from lorafit.adapter.folder import WEIGHTS
from lorafit.errors import Interrupted
from lorafit.events import Evaluated, Note, Started, Stepped
from lorafit.settings.precedence import settle
from lorafit.train import recorded
from lorafit.train import run as run_job


def test_a_run_without_held_out_rows(run, tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (tiny("llama"), "--data", pairs, "--holdout", 0, "--max-steps", 4, "--batch-size", 8)
    done = run("train", *words, "--save-steps", 2, "-o", "a")
    assert done.code == 0 and "40 rows" in done.err and "none held out" in done.err, done.err
    assert "held-out loss" not in done.out + done.err and "failed" not in done.err
    assert "no sample" not in done.err
    assert not [
        e
        for e in map(json.loads, (tmp_path / "a" / "events.jsonl").read_text().splitlines())
        if e["event"] == "evaluated"
    ]
    assert "without held-out rows" in (tmp_path / "a" / "report.html").read_text()
    assert "held-out loss" not in (tmp_path / "a" / "README.md").read_text()
    report = run("train", *words, "-o", "b", "--json").document
    assert report["eval"] == {} and report["sample"] is None and report["steps"] == 4
    refused = run("eval", "a")
    assert refused.code == 2 and "--holdout 0" in refused.err and "--data" in refused.err
    scored = run("eval", "a", "--data", pairs, "--samples", 0, "--json").document
    assert scored["rows"] == 40 and scored["notes"] == [] and scored["page"] == "a/report.html"
    assert "better than the base" in (tmp_path / "a" / "report.html").read_text() or scored["adapters"]
    assert run("merge", "a", "-o", "m").code == 0
    assert run("plan", *words, "--no-probe", "--json").document["data"]["held_out_rows"] == 0
    assert run("data", *words[:5], "--json").document["data"]["held_out_name"] == ""


@pytest.mark.parametrize("option", [("--eval-steps", 3), ("--group-by", "prompt")])
def test_what_needs_held_out_rows_is_refused_without_them(run, pairs, option):
    done = run("train", "--data", pairs, "--holdout", 0, *option)
    assert done.code == 2 and option[0] in done.err and "--holdout 0 holds none out" in done.err
    assert "--eval-data" in done.err


def test_patience_without_held_out_rows(run, pairs):
    done = run("train", "--data", pairs, "--holdout", 0, "--patience", 1, "--eval-steps", 1)
    assert done.code == 2 and "--holdout 0 holds none out" in done.err


def test_files_of_their_own_are_held_out_beside_all_rows(tiny, pairs, tmp_path):
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), eval_data=(str(pairs),), holdout=0.0)
    assert (len(job.rows.train), len(job.rows.held_out)) == (40, 40)


FRACTION = {"epochs": 1.5, "batch_size": 4, "holdout": 0.0, "save_steps": 2}


def test_parts_of_an_epoch(tiny, pairs, tmp_path):
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), **FRACTION)
    events = events_of(job)
    assert job.steps_per_epoch == 10 and sum(isinstance(e, Stepped) for e in events) == 15
    assert [e.epochs for e in events if isinstance(e, Started)] == [1.5]
    assert [e.epoch for e in events[-1].epochs] == [1, 2]
    assert yaml.safe_load((tmp_path / "r" / "run.yaml").read_text())["epochs"] == 1.5
    assert not [e for e in events if isinstance(e, Note) and "failed" in e.text]
    rates = [e.learning_rate for e in events if isinstance(e, Stepped)]
    assert rates[-1] == pytest.approx(job.config.learning_rate / 14), "the schedule ends with the run"


def test_parts_of_an_epoch_are_resumed(tiny, pairs, tmp_path):
    flags = {"data": (str(pairs),), **FRACTION}
    whole = events_of(job_for(tiny("llama"), tmp_path / "whole", **flags))
    at = [0]

    def stop():
        at[0] += 1
        return 15 if at[0] == 12 else 0

    job = job_for(tiny("llama"), tmp_path / "r", stop, **flags)
    with pytest.raises(Interrupted, match="step 12 of 15"):
        list(recorded(job, run_job(job)))
    resumed = events_of(job_for(tiny("llama"), tmp_path / "r", resume=True, **flags))
    assert resumed[-1].steps == whole[-1].steps == 15
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "r"))
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize(
    "epochs, per_epoch, steps", [(1.1, 50, 55), (2.2, 25, 55), (0.7, 10, 7), (1.5, 7, 11), (0.01, 5, 1)]
)
def test_the_plan_counts_the_steps_of_a_part(epochs, per_epoch, steps):
    """1.1 × 50 is 55.00000000000001 in floating point, and 55 steps."""
    config, _ = settle({"epochs": str(epochs)})
    assert config.steps(per_epoch) == steps


@pytest.mark.parametrize("text, value", [("3", 3), ("3.0", 3), ("0.5", 0.5)])
def test_whole_epochs_stay_whole(text, value):
    config, _ = settle({"epochs": text})
    assert repr(config.epochs) == repr(value) == repr(config.as_file()["epochs"])


def test_plan_and_train_agree_on_a_part(run, tiny, pairs, tmp_path):
    words = (tiny("llama"), "--data", pairs, "--epochs", 0.3, "--batch-size", 4)
    planned = run("plan", *words, "--no-probe", "--json").document["estimate"]
    report = run("train", *words, "-o", tmp_path / "r", "--json").document
    assert planned["steps"] == report["steps"] == 3
    assert "0.3 epochs" in run("plan", *words, "--no-probe").out


@pytest.mark.parametrize("free, forced", [("10GB", False), ("100MB", False), ("50MB", True)])
def test_plan_says_what_train_will_refuse(run, free, forced):
    out = run("plan", "--fit", free, "--no-probe").out
    assert ("starts only with --force" in " ".join(out.split())) == forced
    assert ("too big" in out) == (free != "10GB")


def test_the_held_out_loss_is_measured_as_before(tiny, pairs, tmp_path):
    events = events_of(job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=1))
    assert sum(isinstance(e, Evaluated) for e in events) == 2 and set(events[-1].eval) == {"before", "after"}
