"""Seconds of a step, from a block of each kind."""

import pytest
import torch

from lorafit import probe
from lorafit.cost import Shape
from lorafit.plan import resolve
from lorafit.presets import load
from lorafit.simulate import NotSimulated
from lorafit.survey import find, survey


def test_the_probe_times_a_step(tiny):
    source = find(str(tiny("llama")))
    found = survey(source)
    for band, replays in (("last:1", True), ("all", False)):
        plan = resolve(found, load("ffn"), band)
        timing = probe.probe(source, found, plan, Shape(4, 64), torch.device("cpu"), 0.5)
        assert 0 < timing.token_replayed <= timing.token < 1 and timing.step > 0
        assert (timing.token_replayed < timing.token) is replays and timing.length == 64


def test_the_probe_cuts_the_row_where_there_is_no_time_for_it(tiny):
    source = find(str(tiny("llama")))
    found = survey(source)
    plan = resolve(found, load("ffn"), "last:1")
    timing = probe.probe(source, found, plan, Shape(4, 128), torch.device("cpu"), 0.0)
    assert timing.length == probe.FEW and "1 × 64 tokens" in timing.source


def test_blocks_that_do_not_fit_are_not_built(tiny, monkeypatch):
    source = find(str(tiny("llama")))
    found = survey(source)
    monkeypatch.setattr(probe, "free_memory", lambda: 1000)
    with pytest.raises(NotSimulated, match="a block of each kind takes"):
        probe.probe(source, found, resolve(found, load("ffn"), "last:1"), Shape(4, 64), torch.device("cpu"))
