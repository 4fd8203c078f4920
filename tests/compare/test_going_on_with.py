"""What an unfinished comparison goes on with: the candidates, steps and rows that it began with, in one process."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comparisons import comparison_of

from lorafit.compare import CompareFolder, Ended, Request, answer_of, run
from lorafit.compare.results import Outcome, Scores
from lorafit.errors import Interrupted, RequestError
from lorafit.events import Stepped
from lorafit.operations import prepare_comparison, resolve_comparison

LISTS = {"presets": ["basic"], "layers": ["last:1"], "seeds": ["2"]}


def test_the_steps_of_a_budget_leave_all_other_settings_as_they_were(tmp_path):
    """Epochs are derived from the rows before the steps are limited, also the second time."""
    asked = Request({}, presets=("basic",), layers=("high",)).checked()
    whole = prepare_comparison(resolve_comparison(asked, tmp_path / "c", False)).ahead
    limited = replace(asked, budget=f"{0.6 * whole.total:.3f}s")
    first = prepare_comparison(resolve_comparison(limited, tmp_path / "c", False))
    again = prepare_comparison(resolve_comparison(first.asked, tmp_path / "c", False))
    (was,), (now,) = first.ahead.candidates, again.ahead.candidates
    assert was.config.max_steps == first.asked.steps < whole.costs[was.name].steps
    assert now.config == was.config and now.digest == was.digest and was.config.epochs == 3


def test_candidates_that_changed_are_not_gone_on_with(tiny, pairs, tmp_path, run):
    grid, out = tmp_path / "grid.yaml", tmp_path / "c"
    text = (
        "base: {epochs: EPOCHS, batch_size: 8}\ncandidates:\n- {name: one, preset: basic, layers: last:1}\n"
    )
    grid.write_text(text.replace("EPOCHS", "1"))
    assert run("compare", tiny("llama"), "--data", pairs, "--grid", grid, "-o", out, "-q").code == 0
    grid.write_text(text.replace("EPOCHS", "2"))
    again = run("compare", "--resume", out)
    assert again.code == 2 and "`one` is not the candidate" in again.err and "choose another -o" in again.err
    grid.write_text(text.replace("EPOCHS", "1"))
    assert run("compare", "--resume", out, "-q").code == 0


def test_one_process_writes_a_comparison(tmp_path):
    folder = CompareFolder(tmp_path / "c")
    folder.open(False)
    with folder.locked(), pytest.raises(RequestError, match="another process is writing"), folder.locked():
        raise AssertionError
    with folder.locked():
        pass


def test_a_comparison_that_another_process_writes_is_left_alone(tiny, pairs, tmp_path, run):
    words = ["--presets", "basic", "--layers", "last:1", "--max-steps", 1, "-o", tmp_path / "c", "-q"]
    assert run("compare", tiny("llama"), "--data", pairs, *words).code == 0
    with CompareFolder(tmp_path / "c").locked():
        refused = run("compare", "--resume", tmp_path / "c")
    assert refused.code == 2 and "another process is writing" in refused.err
    assert run("compare", "--resume", tmp_path / "c").code == 0


def test_a_grid_that_got_a_candidate_more_is_not_gone_on_with(tmp_path):
    folder = CompareFolder(tmp_path / "c")
    folder.open(False)
    folder.begin(Request({}), ["r"], {"one": "1"})
    folder.begin(Request({}), ["r"], {"one": "1"})
    with pytest.raises(RequestError, match="`two` is not the candidate"):
        folder.begin(Request({}), ["r"], {"one": "1", "two": "2"})


def test_a_seed_that_failed_counts_nowhere(tiny, pairs, tmp_path):
    comparison = comparison_of(tiny("llama"), pairs, tmp_path / "c", **LISTS)
    list(comparison.run())
    good, bad = comparison.outcomes().values()
    comparison.folder.keep(replace(bad, status="failed", reason="it diverged", seconds=0.0, scores=None))
    answer = answer_of(
        "m", "c", comparison.ahead.candidates, comparison.outcomes(), comparison.folder.base(), ()
    )
    (row,) = answer.choices
    assert row.seconds == good.seconds and row.runs == (good.name,) and row.seeds == (0,)
    assert answer.missing == ((bad.name, "it diverged"),)


def test_an_end_between_two_candidates_is_no_answer(tiny, pairs, tmp_path, monkeypatch):
    """Workers may all end a candidate as the signal comes: none of them raises, and some are not trained."""
    ended = []
    comparison = comparison_of(
        tiny("llama"), pairs, tmp_path / "c", stop=lambda: 15 if ended else 0, **{**LISTS, "seeds": ["3"]}
    )
    comparison.workers = 2
    monkeypatch.setattr(run, "spread", lambda tasks, workers, stop: tasks[0](stop))
    with pytest.raises(Interrupted, match="between two candidates") as stopped:
        for event in comparison.run():
            ended += [event] if isinstance(event, Ended) else []
    assert len(ended) == 1 and stopped.value.exit_code == 143 and "--resume" in stopped.value.hint


def test_texts_of_one_name_are_all_measured(tiny, pairs, tmp_path, run):
    for language in ("en", "de"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "wiki.txt").write_text(f"A text in {language}.\n" * 4)
    words = ["--presets", "basic", "--layers", "last:1", "--max-steps", 1, "-o", tmp_path / "c", "--json"]
    also = [word for name in ("en", "de") for word in ("--also", tmp_path / name / "wiki.txt")]
    found = run("compare", tiny("llama"), "--data", pairs, *words, *also).document
    assert [each["file"] for each in found["choices"][0]["also"]] == [str(p) for p in also[1::2]]
    assert json.loads((tmp_path / "c" / "compare.json").read_text())["choices"] == found["choices"]


def test_the_seconds_of_earlier_rounds_are_counted():
    seen = run._Seen(until=4)
    seen.on(Stepped(4, 1, 1.0, 100, 50, 2.5, 1e-3, 0.1))
    job = SimpleNamespace(device=torch.device("cpu"), memory_before=0)
    outcome = seen.outcome(Outcome("a", "a", "failed"), Scores(()), job, 7.0)
    assert outcome.status == "paused" and outcome.step == 4
    assert outcome.seconds == 9.5 and outcome.tokens_per_second == pytest.approx(40.0)
