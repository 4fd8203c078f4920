"""What the model says to a held-out row before training and after."""

import json

import pytest
from jobs import events_of, job_for, losses

from lorafit.adapter.folder import WEIGHTS
from lorafit.errors import Interrupted
from lorafit.events import Note


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_every_task_has_a_sample(tiny, pairs, tmp_path, family):
    job = job_for(
        tiny(family), tmp_path / "r", data=(str(pairs),), max_steps=12, learning_rate=3e-2, sample=True
    )
    said = events_of(job)[-1].sample
    assert said.prompt and said.reference and said.before != said.after
    page = (tmp_path / "r" / "report.html").read_text()
    assert "A held-out row, before and after" in page


def test_of_a_conversation_the_last_user_turn_is_shown(tiny, tmp_path, run):
    """Not the system prompt, earlier turns or the template's words."""
    said = [("user", "Hello there."), ("assistant", "Good day."), ("user", "What do you like?")]
    turns = [
        {"role": "system", "content": "Be kind."},
        *({"role": r, "content": c, "weight": 0} for r, c in said),
    ]
    row = {"messages": [*turns, {"role": "assistant", "content": "I like to read."}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    words = ("train", tiny("llama"), "--data", tmp_path / "d.jsonl", "--max-steps", 1, "-o", tmp_path / "r")
    sample = run(*words, "--holdout", "0.5", "--json", "-q").document["sample"]
    assert (sample["prompt"], sample["reference"]) == ("What do you like?", "I like to read.")
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<strong>What do you like?</strong>" in page


def test_the_base_says_it_before(tiny, pairs, tmp_path, run):
    """The same words as `eval` shows for the base, as far as they go."""
    output = tmp_path / "r"
    words = ("train", tiny("llama"), "--data", pairs, "--max-steps", 3, "-o", output)
    done = run(*words, "--json", "-q")
    said = done.document["sample"]
    (shown,) = run("eval", output, "--samples", 1, "--json").document["samples"]
    assert (shown["prompt"], shown["reference"]) == (said["prompt"], said["reference"])
    before, after = (
        said[when].removesuffix("…") for when in ("before", "after")
    )  # shorter answers than those of `eval`
    assert shown["base"].startswith(before) and shown["adapters"][0].startswith(after)
    again = run(*words, "--no-sample", "--overwrite", "--json", "-q")
    assert again.document["sample"] is None


def test_a_sample_changes_nothing_in_training(tiny, pairs, tmp_path):
    flags = {"data": (str(pairs),), "epochs": 1, "batch_size": 8, "dropout": 0.2}
    one = events_of(job_for(tiny("llama"), tmp_path / "a", sample=True, **flags))
    two = events_of(job_for(tiny("llama"), tmp_path / "b", sample=False, **flags))
    assert losses(one) == losses(two) and one[-1].sample and two[-1].sample is None
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_a_resumed_run_keeps_what_was_said_before(tiny, pairs, tmp_path):
    flags = {"data": (str(pairs),), "epochs": 1, "batch_size": 4, "learning_rate": 3e-2, "sample": True}
    straight = events_of(job_for(tiny("llama"), tmp_path / "a", **flags))[-1]
    with pytest.raises(Interrupted):
        events_of(job_for(tiny("llama"), tmp_path / "b", stop=lambda: 2, **flags))
    resumed = events_of(job_for(tiny("llama"), tmp_path / "b", resume=True, **flags))[-1]
    assert resumed.sample == straight.sample is not None


def test_a_model_that_cannot_generate_costs_the_sample_alone(tiny, pairs, tmp_path):
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=2, sample=True)
    job.model.get_base_model().generate = None
    events = events_of(job)
    assert events[-1].sample is None and (tmp_path / "r" / WEIGHTS).is_file()
    assert any("no sample of what the model says" in e.text for e in events if isinstance(e, Note))
