"""Runs named by their folder: resumed with nothing else, and offered where none or an unfinished one is named."""

import json
import shutil

import pytest
from jobs import events_of, job_for

from lorafit.adapter.folder import WEIGHTS
from lorafit.errors import Interrupted

FLAGS = {
    "data": ("pairs.jsonl",),
    "epochs": 2,
    "batch_size": 4,
    "layers": "last:2",
    "rank": 4,
    "dropout": 0.1,
    "template_date": "2026-01-31",
}


@pytest.fixture
def stopped(tiny, pairs, tmp_path, monkeypatch):
    """A run stopped after some steps, in runs/, of a model and data named by relative paths."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny("llama"), "m")
    shutil.copy(pairs, "pairs.jsonl")
    seen = []
    job = job_for("m", tmp_path / "runs" / "a", stop=lambda: 2 if seen else 0, save_steps=2, **FLAGS)
    with pytest.raises(Interrupted) as end:
        from lorafit.events import Saved
        from lorafit.train import recorded, run

        for event in recorded(job, run(job)):
            seen += [event] if isinstance(event, Saved) else []
    assert f"lorafit train --resume {tmp_path}/runs/a" in end.value.hint
    return tmp_path / "runs" / "a"


@pytest.mark.parametrize(
    "words",
    [
        ("--resume", "runs/a"),
        ("--resume", "-o", "runs/a"),
        ("-o", "runs/a.partial", "--resume"),
        ("--config", "runs/a.partial/run.yaml", "--resume", "-o", "runs/a"),
        ("m", "--data", "pairs.jsonl", "--layers", "last:2", "--rank", 4, "--dropout", 0.1, "--epochs", 2,
         "--batch-size", 4, "-o", "runs/a", "--resume"),
    ],
    ids=lambda words: " ".join(map(str, words[:3])),
)  # fmt: skip
def test_a_run_is_resumed_by_its_folder(stopped, run, words):
    done = run("train", *words, "--json")
    assert done.code == 0 and "continued from step" in " ".join(done.err.split()), done.err
    straight = events_of(job_for("m", stopped.parent / "b", **FLAGS))[-1]
    assert done.document["eval"]["after"]["loss"] == straight.eval["after"].loss
    assert (stopped / WEIGHTS).read_bytes() == (stopped.parent / "b" / WEIGHTS).read_bytes()
    again = run("train", *[str(word).replace("a.partial", "a") for word in words])
    assert again.code == 0 and "nothing to resume" in again.err


def test_a_run_is_resumed_from_elsewhere(stopped, run, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    other = run("train", "--resume", stopped, "--rank", 8)
    assert other.code == 2 and "`rank` was 4, is 8" in other.err
    done = run("train", "--resume", stopped, "--json")
    assert done.code == 0 and done.document["output"] == str(stopped), done.err


def test_a_checkpoint_that_kept_the_model_as_it_was_typed(stopped, run):
    """As earlier versions did."""
    from lorafit.digests import seal

    for checkpoint in (stopped.parent / "a.partial").glob("checkpoint-*"):
        path = checkpoint / "state.json"
        state = json.loads(path.read_text())
        assert state["run"]["model"].startswith("/")
        path.write_text(json.dumps({**state, "run": {**state["run"], "model": "m"}}))
        seal(checkpoint)
    assert run("train", "--resume", "runs/a").code == 0


def test_what_is_not_a_run_is_not_resumed(stopped, run):
    for words in (("runs/nowhere",), ("m",), ()):
        done = run("train", "--resume", *words)
        assert done.code == 2 and "lorafit train --resume runs/a" in done.err and "-o DIR" in done.err
    assert not (stopped.parent / "nowhere.partial").exists()


@pytest.mark.parametrize("command", [("eval",), ("merge", "-o", "x")], ids=lambda words: words[0])
def test_an_unfinished_run_offers_its_checkpoints(stopped, run, command):
    first, *rest = command
    names = sorted(p.name for p in (stopped.parent / "a.partial").glob("checkpoint-*"))
    for named in ("runs/a", "runs/a.partial"):
        done = run(first, named, *rest)
        assert done.code == 2 and f"`{named}` is an unfinished run" in done.err, done.err
        assert all(name in done.err for name in names) and f"runs/a.partial/{names[-1]}" in done.err
        assert "lorafit train --resume runs/a" in done.err
    assert run(first, f"runs/a.partial/{names[-1]}", *rest).code == 0
    assert run("train", "--resume", "runs/a", "-q").code == 0
    for words, offer in (
        ((), f"{first} runs/a"),
        (("runs/",), "the last one is runs/a"),
        (("runs/b",), "runs/a"),
    ):
        done = run(first, *words, *rest)
        assert done.code == 2 and offer in done.err, done.err
