import json
from dataclasses import replace

import pytest
import torch
from comparisons import FLAGS, comparison_of
from jobs import events_of, job_for
from safetensors.torch import load_file

from lorafit.adapter import WEIGHTS
from lorafit.compare import Began, Ended
from lorafit.errors import Interrupted
from lorafit.events import Filling, PrefixCache, Stepped, TrainReport


def grid(**more):
    return {"presets": ["basic,ffn"], "layers": ["low,high"], "seeds": ["2"], **more}


def test_each_candidate_equals_what_train_alone_gives(tiny, pairs, tmp_path):
    """The same losses and the same adapter, though base, rows, batches and states are shared."""
    comparison = comparison_of(tiny("llama"), pairs, tmp_path / "c", **grid())
    events = list(comparison.run())
    assert [e.of for e in events if isinstance(e, Began)] == [8] * 8
    assert comparison.shared.loaded == 1
    for one in comparison.ahead.candidates:
        made = job_for(
            tiny("llama"), tmp_path / one.name, data=(str(pairs),), preset=one.config.preset, layers=one.config.layers,
            seed=one.config.seed, data_seed=0, prefix_cache="off", sample=False, **FLAGS,
        )  # fmt: skip
        report = events_of(made)[-1]
        scores = comparison.outcomes()[one.name].scores
        loss = sum(s.loss_sum for s in scores.rows) / sum(s.weight for s in scores.rows)
        assert loss == pytest.approx(report.eval["after"].loss, abs=1e-6)
        mine, alone = (load_file(folder / one.name / WEIGHTS) for folder in (tmp_path / "c", tmp_path))
        assert mine.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(mine[name], value, atol=1e-6, rtol=0)


def test_the_base_is_the_same_to_the_bit_after_each_candidate(tiny, pairs, tmp_path):
    comparison = comparison_of(tiny("llama"), pairs, tmp_path / "c", **grid(seeds=["1"]))
    model = comparison.shared.base.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for event in comparison.run():
        if isinstance(event, Ended):
            now = model.state_dict()
            assert now.keys() == before.keys()
            assert all(torch.equal(now[name], value) for name, value in before.items())


def test_a_candidate_that_changes_the_base_costs_a_load_and_no_more(tiny, pairs, tmp_path):
    """Trained biases stay in the base: the next candidate gets a fresh one."""
    (tmp_path / "biased.yaml").write_text("roles: [q]\nlora: {bias: all, r: 4}\n")
    lists = {"presets": [f"{tmp_path / 'biased.yaml'},basic"], "layers": ["high"]}
    comparison = comparison_of(tiny("gpt2"), pairs, tmp_path / "c", **lists)
    list(comparison.run())
    assert comparison.shared.loaded == 2
    plain = comparison_of(tiny("gpt2"), pairs, tmp_path / "d", presets=["basic"], layers=["high"])
    list(plain.run())
    mine, alone = (c.outcomes()["basic-high"].scores for c in (comparison, plain))
    assert mine == alone


def test_the_states_of_all_cuts_are_filled_in_one_pass(tiny, pairs, tmp_path):
    comparison = comparison_of(
        tiny("llama"), pairs, tmp_path / "c", presets=["basic"], layers=["last:1,last:2,all"], seeds=["2"]
    )
    events, there = [], None
    for event in comparison.run():
        if isinstance(event, Began) and there is None:  # before the first candidate
            stores = [shared.store for shared in comparison.shared.states.values()]
            there = [
                store.has("held-out 0") and all(store.has(f"train {n}.0") for n in range(4))
                for store in stores
            ]
            assert sum(isinstance(e, Filling) and e.done == e.tokens for e in events) == 1
        events.append(event)
    assert there == [True, True]  # both cuts
    kept = [e.where for e in events if isinstance(e, PrefixCache)]
    assert kept == ["memory"] * 4 + ["off"] * 2


@pytest.mark.parametrize("after", [1, 7, 12])
def test_a_comparison_that_was_stopped_goes_on_to_the_same_end(tiny, pairs, tmp_path, after):
    """Stopped after so many steps in all, within a candidate or between two."""
    lists = grid(seeds=["1"], presets=["basic"])
    straight = comparison_of(tiny("llama"), pairs, tmp_path / "a", **lists)
    list(straight.run())
    steps = 0
    first = comparison_of(
        tiny("llama"), pairs, tmp_path / "b", stop=lambda: 2 if steps >= after else 0, **lists
    )
    with pytest.raises(Interrupted) as stopped:
        for event in first.run():
            steps += type(event).__name__ == "Stepped"
    assert f"lorafit compare --resume {tmp_path / 'b'}" in stopped.value.hint
    done = sum(o.status == "finished" for o in first.outcomes().values())
    second = comparison_of(tiny("llama"), pairs, tmp_path / "b", resume=True, **lists)
    events = list(second.run())
    assert {o.reason for o in second.outcomes().values()} == {""}
    assert sum(isinstance(e, TrainReport) for e in events) == 2 - done
    for name, outcome in straight.outcomes().items():
        assert second.outcomes()[name].scores == outcome.scores


def test_a_run_that_finished_without_its_scores_is_scored_again(tiny, pairs, tmp_path):
    lists = grid(seeds=["1"], presets=["basic"])
    first = comparison_of(tiny("llama"), pairs, tmp_path / "c", **lists)
    list(first.run())
    was = first.outcomes()
    (tmp_path / "c" / "scores" / "basic-high.json").unlink()
    again = comparison_of(tiny("llama"), pairs, tmp_path / "c", resume=True, **lists)
    assert not any(isinstance(e, TrainReport) for e in again.run())
    mine = again.outcomes()["basic-high"]
    for own, other in zip(mine.scores.rows, was["basic-high"].scores.rows, strict=True):
        assert own.loss_sum == pytest.approx(other.loss_sum, abs=1e-5)
    assert mine.seconds == was["basic-high"].seconds


def test_a_candidate_that_fails_is_a_row_with_its_reason(tiny, pairs, tmp_path):
    (tmp_path / "wild.yaml").write_text("roles: [q]\nlora: {alpha: 100000000.0}\n")
    lists = {"presets": [f"{tmp_path / 'wild.yaml'},basic"], "layers": ["high"], "learning_rates": ["10"]}
    comparison = comparison_of(tiny("llama"), pairs, tmp_path / "c", **lists)
    list(comparison.run())
    bad, good = comparison.outcomes().values()
    assert good.status == "finished" and bad.status == "failed" and bad.reason
    assert (tmp_path / "c" / good.name / "run.yaml").is_file() and not (tmp_path / "c" / bad.name).exists()
    again = comparison_of(tiny("llama"), pairs, tmp_path / "c", resume=True, **lists)
    assert [e.name for e in again.run() if isinstance(e, Began)] == [bad.name], "it is tried again, once"


def test_every_candidate_is_a_run_that_eval_and_merge_take(tiny, pairs, tmp_path, run):
    comparison = comparison_of(tiny("llama"), pairs, tmp_path / "c", presets=["basic"], layers=["high"])
    list(comparison.run())
    shown = run("eval", tmp_path / "c" / "basic-high", "--json", "--samples", 0).document
    scores = comparison.outcomes()["basic-high"].scores
    loss = sum(s.loss_sum for s in scores.rows) / sum(s.weight for s in scores.rows)
    assert shown["adapters"][0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert run("merge", tmp_path / "c" / "basic-high", "-o", tmp_path / "merged").code == 0
    assert json.loads((tmp_path / "c" / "request.json").read_text())["presets"] == ["basic"]


def test_halving_drops_the_worse_and_the_rest_ends_as_without_it(tiny, pairs, tmp_path):
    lists = {"presets": ["basic"], "layers": ["high"], "learning_rates": ["1e-9,2e-9,1e-2,2e-2"]}
    flags = {"epochs": 4, "holdout": 0.5, "batch_size": 4}
    whole = comparison_of(tiny("llama"), pairs, tmp_path / "a", flags=flags, **lists)
    list(whole.run())
    halved = comparison_of(tiny("llama"), pairs, tmp_path / "b", halving=True, flags=flags, **lists)
    list(halved.run())
    outcomes = halved.outcomes()
    dropped = {name for name, o in outcomes.items() if o.status == "dropped"}
    assert dropped == {"basic-high-lr1e-9", "basic-high-lr2e-9"}
    assert all("of 20" in outcomes[name].reason for name in dropped)
    for name in outcomes.keys() - dropped:
        assert outcomes[name].scores == whole.outcomes()[name].scores
    assert {choice for cut in halved.folder.cuts() for choice in cut.dropped} == dropped
    # a candidate whose round was decided without it is not tried again, and nothing is filled for it
    lost = min(dropped)
    halved.folder.keep(replace(outcomes[lost], status="failed", reason="no memory"))
    again = comparison_of(
        tiny("llama"), pairs, tmp_path / "b", halving=True, resume=True, flags=flags, **lists
    )
    assert not any(isinstance(e, (TrainReport, Began, Filling)) for e in again.run())
    assert again.outcomes()[lost].reason == "no memory"


def test_a_candidate_that_goes_on_counts_the_seconds_of_all_rounds(tiny, pairs, tmp_path):
    lists = {"presets": ["basic"], "layers": ["high"], "learning_rates": ["1e-3,1e-2"]}
    comparison = comparison_of(
        tiny("llama"), pairs, tmp_path / "c", halving=True, flags={"epochs": 4, "batch_size": 4}, **lists
    )
    seconds, name = {}, ""
    for event in comparison.run():
        if isinstance(event, Began):
            name = event.name
        elif isinstance(event, Stepped):
            seconds[name] = seconds.get(name, 0.0) + event.seconds
        elif isinstance(event, Ended) and event.outcome.status == "paused":
            assert event.outcome.seconds == pytest.approx(seconds[name])
    assert len(comparison.folder.cuts()) == 2 and len(seconds) == 2


def test_of_a_short_run_only_what_it_sees_is_filled(tiny, pairs, tmp_path):
    comparison = comparison_of(
        tiny("llama"),
        pairs,
        tmp_path / "c",
        presets=["basic,ffn"],
        layers=["high"],
        flags={"max_steps": 2, "batch_size": 4},
    )
    events = list(comparison.run())
    (shared,) = comparison.shared.states.values()
    kept = [f"train {n}.0" for n in range(8) if shared.store.has(f"train {n}.0")]
    assert len(kept) == 2 and shared.store.has("held-out 0")
    whole = [e.tokens for e in events if isinstance(e, Filling) and e.done == e.tokens]
    assert len(whole) == 3 and len(set(whole)) == 1  # in one pass, and found again by both


@pytest.mark.parametrize("family", ["bert", "t5", "mixtral"])
def test_other_kinds_of_models_are_compared_too(tiny, pairs, tmp_path, family):
    """A masked model, one with two stacks, one with experts: each ends where train alone ends."""
    comparison = comparison_of(
        tiny(family),
        pairs,
        tmp_path / "c",
        presets=["basic"],
        layers=["last:1,all"],
        flags={"max_steps": 3, "batch_size": 8},
    )
    list(comparison.run())
    assert {o.reason for o in comparison.outcomes().values()} == {""}
    for one in comparison.ahead.candidates:
        made = job_for(
            tiny(family), tmp_path / one.name, data=(str(pairs),), preset="basic", layers=one.config.layers, data_seed=0,
            prefix_cache="off", sample=False, max_steps=3, batch_size=8, holdout=FLAGS["holdout"],
        )  # fmt: skip
        made.config = replace(made.config, epochs=one.config.epochs)
        loss = events_of(made)[-1].eval["after"].loss
        rows = comparison.outcomes()[one.name].scores.rows
        assert sum(s.loss_sum for s in rows) / sum(s.weight for s in rows) == pytest.approx(loss, abs=1e-6)


def test_a_run_shorter_than_an_epoch_reads_states_on_disk(tiny, pairs, tmp_path):
    """The store holds what some candidate trains on, and takes nothing more."""
    flags = {"max_steps": 2, "batch_size": 4}
    lists = {"presets": ["basic"], "layers": ["high"], "seeds": ["2"]}
    found = {}
    for where in ("disk", "off"):
        comparison = comparison_of(
            tiny("llama"), pairs, tmp_path / where, **lists, flags={**flags, "prefix_cache": where}
        )
        told = [e.where for e in comparison.run() if isinstance(e, PrefixCache)]
        assert told == [where] * 2
        assert {o.reason for o in comparison.outcomes().values()} == {""}
        found[where] = {name: o.scores.rows for name, o in comparison.outcomes().items()}
        comparison.shared.close()
    assert found["disk"] == found["off"]
