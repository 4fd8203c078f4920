"""Seconds of a step, from a block of each kind."""

import pytest
import torch

from lorafit.adapter.plan import resolve
from lorafit.estimate import timing as probing
from lorafit.estimate.simulate import NotSimulated
from lorafit.estimate.terms import Shape
from lorafit.model.chart import chart_of
from lorafit.model.source import find
from lorafit.settings.preset import load_preset


def test_the_probe_times_a_step(tiny):
    source = find(str(tiny("llama")))
    found = chart_of(source)
    for band, replays in (("last:1", True), ("all", False)):
        plan = resolve(found, load_preset("ffn"), band)
        timing = probing.probe(source, found, plan, Shape(4, 64), torch.device("cpu"), 0.5)
        assert 0 < timing.token_replayed <= timing.token < 1 and timing.step > 0
        assert (timing.token_replayed < timing.token) is replays and timing.length == 64


def test_the_probe_cuts_the_row_where_there_is_no_time_for_it(tiny):
    source = find(str(tiny("llama")))
    found = chart_of(source)
    plan = resolve(found, load_preset("ffn"), "last:1")
    timing = probing.probe(source, found, plan, Shape(4, 128), torch.device("cpu"), 0.0)
    assert timing.length == probing.FEW and "1 row of 64 tokens" in timing.source


def test_blocks_that_do_not_fit_are_not_built(tiny, monkeypatch):
    source = find(str(tiny("llama")))
    found = chart_of(source)
    monkeypatch.setattr(probing, "free_memory", lambda: 1000)
    with pytest.raises(NotSimulated, match="a block of each kind takes"):
        probing.probe(
            source, found, resolve(found, load_preset("ffn"), "last:1"), Shape(4, 64), torch.device("cpu")
        )


def test_the_fastest_try_counts_and_a_busy_machine_is_unsure(tiny, monkeypatch):
    source = find(str(tiny("llama")))
    found = chart_of(source)
    plan = resolve(found, load_preset("ffn"), "last:1")
    tries = iter([9.0, 9.0, 8.0, 1.0, 5.0, 7.0, *[1.1, 1.05] * 99])
    monkeypatch.setattr(probing, "_timed", lambda *_: (next(tries), 0.5, 0.1))
    timing = probing.probe(source, found, plan, Shape(4, 64), torch.device("cpu"), 0.0)
    assert timing.token * 64 == pytest.approx(1.0) and timing.sure
    tries = iter([float(2**n) for n in range(99)])
    timing = probing.probe(source, found, plan, Shape(4, 64), torch.device("cpu"), 0.0)
    assert timing.token * 64 == pytest.approx(2.0) and not timing.sure and timing.spread == pytest.approx(3)


def test_an_unsure_timing_is_not_kept_and_fresh_measures_again(tiny, monkeypatch):
    from lorafit.estimate.forecast import prepare
    from lorafit.estimate.terms import Timing
    from lorafit.settings.precedence import derive_from_model, settle

    source = find(str(tiny("llama")))
    found = chart_of(source)
    plan = resolve(found, load_preset("ffn"), "last:1")
    settings = derive_from_model(settle({"model": source.place})[0], found)
    answers = iter(
        [Timing(9.0, 9.0, 9.0, 64, "x", 2.0), *[Timing(float(n), 1.0, 1.0, 64, "x", 0.01) for n in (1, 2)]]
    )
    monkeypatch.setattr(probing, "probe", lambda *_: next(answers))

    def token(**more):
        ahead, _ = prepare(settings, source, found, **more)
        cost = ahead.estimate(plan, timing := ahead.timing(plan))
        assert any("busy" in note for note in cost.assumptions) is not timing.sure
        return (
            ahead.kept.get(Timing, [*ahead._facts(plan, ahead._typical(ahead.shape)), "x"]) or timing.spread
        )

    assert [token(), token(), token(), token(fresh=True)] == [2.0, 0.01, 0.01, 0.01]
    assert next(answers, None) is None, "the second answer was kept, and --fresh asked for a third"
