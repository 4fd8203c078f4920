"""Candidates on a base whose lower layers are read as they run: the same results, and these layers are never held."""

from contextlib import closing

import pytest
import torch
from comparisons import comparison_of
from safetensors.torch import load_file

from lorafit.adapter import WEIGHTS
from lorafit.compare import Began, Hint, resolve_all
from lorafit.compare.grid import from_lists
from lorafit.errors import Interrupted, RunError
from lorafit.events import Filling, TrainReport
from lorafit.forward.streaming import Trial
from lorafit.model import chart_of, find

LISTS = {"presets": ["basic,ffn"], "layers": ["last:1,last:2"]}


def flags(residency, **more):
    return {"flags": {"prefix_residency": residency, "epochs": 1, **more}}


def ended(comparison):
    """Its events, to the end."""
    with closing(comparison.shared):
        return list(comparison.run())


def results(comparison):
    return {name: (outcome.status, outcome.scores) for name, outcome in comparison.outcomes().items()}


def losses(comparison):
    """The loss of each held-out row, under the base and under each candidate."""
    found = [comparison.folder.base(), *(outcome.scores for outcome in comparison.outcomes().values())]
    return [row.loss_sum for scores in found for row in scores.rows]


@pytest.mark.parametrize(
    "family, where", [("llama", "memory"), ("llama", "disk"), ("gpt_neox", "disk"), ("mixtral", "memory")]
)
def test_streamed_candidates_end_as_resident_ones_do(tiny, pairs, tmp_path, monkeypatch, family, where):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no later test finds these states
    made = {}
    for residency in ("resident", "stream"):
        made[residency] = comparison_of(
            tiny(family), pairs, tmp_path / residency, **LISTS, **flags(residency, prefix_cache=where)
        )
        made[residency].hints = True
        events = ended(made[residency])
        made[f"{residency} hint"] = next(e for e in events if isinstance(e, Hint))
    assert losses(made["stream"]) == pytest.approx(losses(made["resident"]), rel=1e-6)
    assert made["stream hint"].scores == pytest.approx(made["resident hint"].scores, rel=1e-5)
    for one in made["stream"].ahead.candidates:
        mine, other = (load_file(tmp_path / way / one.name / WEIGHTS) for way in ("stream", "resident"))
        assert mine.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, atol=1e-6, rtol=0)

    streamed = made["stream"].shared.base.streamed
    blocks = list(streamed.model.get_submodule(streamed.stack).children())
    assert streamed.cut == len(blocks) - 2  # the lowest of the candidates' bands is held
    assert all(p.is_meta for block in blocks[:-2] for p in block.parameters())
    assert not any(p.is_meta for block in blocks[-2:] for p in block.parameters())
    below = streamed.bytes_of(0, streamed.cut)  # read for the trial, and for all rows of all candidates
    assert streamed.read == streamed.bytes_of(-1, 0) + 2 * below and made["stream"].shared.loaded == 1


def test_workers_share_a_streamed_base(tiny, pairs, tmp_path):
    alone = comparison_of(tiny("llama"), pairs, tmp_path / "a", **LISTS, **flags("stream"))
    ended(alone)
    both = comparison_of(tiny("llama"), pairs, tmp_path / "b", **LISTS, **flags("stream"))
    both.workers = 2
    ended(both)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-6)


def test_a_streamed_comparison_that_was_stopped_goes_on(tiny, pairs, tmp_path):
    straight = comparison_of(tiny("llama"), pairs, tmp_path / "a", **LISTS, **flags("stream"))
    ended(straight)
    trained = []
    first = comparison_of(
        tiny("llama"), pairs, tmp_path / "b", stop=lambda: 2 if trained else 0, **LISTS, **flags("stream")
    )
    with closing(first.shared), pytest.raises(Interrupted):
        for event in first.run():
            trained += [event] if isinstance(event, TrainReport) else []
    again = comparison_of(tiny("llama"), pairs, tmp_path / "b", resume=True, **LISTS, **flags("stream"))
    events = ended(again)
    assert sum(isinstance(e, TrainReport) for e in events) == 3
    assert results(again) == results(straight)


def test_a_run_that_lost_its_scores_is_scored_on_the_states(tiny, pairs, tmp_path):
    first = comparison_of(tiny("llama"), pairs, tmp_path / "c", **LISTS, **flags("stream"))
    ended(first)
    was = results(first)
    (tmp_path / "c" / "scores" / "basic-last2.json").unlink()
    again = comparison_of(tiny("llama"), pairs, tmp_path / "c", resume=True, **LISTS, **flags("stream"))
    assert not any(isinstance(e, TrainReport) for e in ended(again))
    for name, (_, scores) in results(again).items():
        for mine, other in zip(scores.rows, was[name][1].rows, strict=True):
            assert mine.loss_sum == pytest.approx(other.loss_sum, abs=1e-5)


def test_what_cannot_be_streamed_is_left_out_with_the_reason(tiny):
    found = chart_of(find(str(tiny("llama"))))
    wanted = from_lists(["basic"], ["high,all"], [], [], [])
    candidates, impossible = resolve_all(found, wanted, {"prefix_residency": "stream"}, None, None)
    assert [one.config.layers for one in candidates] == ["high"]
    assert "begins at layer 0" in impossible[0].reason


def test_auto_streams_when_a_candidate_would_not_fit(pairs, tmp_path, monkeypatch):
    def planned(layers):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        lists = {"presets": ["ffn"], "layers": [layers], "flags": {"batch_size": 32, "epochs": 1}}
        return comparison_of("demo", pairs, target, **lists).ahead

    def ways(ahead):
        return {one.config.prefix_residency for one in ahead.candidates}

    whole = planned("mid,high")
    assert ways(whole) == {"resident"}
    largest = max(cost.memory.peak for cost in whole.costs.values())
    monkeypatch.setattr("lorafit.estimate.forecast.free_on", lambda *_: largest)
    streamed = planned("mid,high")
    assert ways(streamed) == {"stream"} and streamed.peak < whole.peak
    assert streamed.candidates[0].config.why("prefix_residency").startswith("holding all layers takes")
    assert ways(planned("high,all")) == {"resident"}  # all begins at layer 0


def test_a_state_that_a_layer_above_does_not_only_read_ends_it(tiny, pairs, tmp_path, monkeypatch):
    comparison = comparison_of(tiny("llama"), pairs, tmp_path / "e", **LISTS, **flags("stream"))
    monkeypatch.setattr(Trial, "differs", lambda trial, model: trial.prefix.cut == 3)
    with closing(comparison.shared), pytest.raises(RunError, match="would not be exact"):
        for event in comparison.run():
            assert isinstance(event, Filling) and not isinstance(event, Began)
