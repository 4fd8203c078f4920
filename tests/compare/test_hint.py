from dataclasses import replace

import pytest
import torch
from comparisons import comparison_of
from jobs import job_for

from lorafit.adapter import inject_plan, planned
from lorafit.compare.hint import RANK, hint_of
from lorafit.forward import Forward
from lorafit.settings import Lora
from lorafit.train import micro_batches_of


def test_the_signal_is_the_gradient_that_an_adapter_would_start_from(tiny, pairs, tmp_path):
    """For a weight W with gradient G, mean |G A^T|, from a backward pass through W itself."""
    comparison = comparison_of(
        tiny("llama"), pairs, tmp_path / "c", presets=["all"], layers=["all"], flags={"batch_size": 8}
    )
    shared, (one,) = comparison.shared, comparison.ahead.candidates
    before = {name: value.clone() for name, value in shared.base.model.state_dict().items()}
    hint = hint_of(shared, [one], comparison.rows, comparison.tokenizer, range(4))
    now = shared.base.model.state_dict()
    assert shared.loaded == 1 and all(torch.equal(now[name], value) for name, value in before.items())

    plan = planned(shared.base.found, replace(one.preset, lora=Lora(r=RANK, alpha=RANK)), one.config)
    torch.manual_seed(0)
    model = inject_plan(shared.base.model, plan, "causal")
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    a = layer.lora_A["default"].weight.detach().clone()
    base = model.unload()
    weight = base.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    forward = Forward.of(base, "causal")
    batches = micro_batches_of(comparison.rows, one.config, "causal", comparison.tokenizer, range(4), 0)
    for batch in batches:
        (forward.loss_sum(base, batch) / batch.weight).backward()
    assert hint.signals["down"][1] == pytest.approx(float((weight.grad @ a.t()).abs().mean()), rel=1e-4)
    assert list(hint.signals) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert all(len(cells) == 4 for cells in hint.signals.values())


def test_scores_count_what_a_choice_trains_and_results_stay_the_same(tiny, pairs, tmp_path):
    lists = {"presets": ["basic,all"], "layers": ["high"], "flags": {"batch_size": 8, "epochs": 1}}
    plain = comparison_of(tiny("llama"), pairs, tmp_path / "a", **lists)
    list(plain.run())
    hinted = comparison_of(tiny("llama"), pairs, tmp_path / "b", **lists)
    hinted.hints = True
    hint = next(hinted.run())
    assert hint.scores["all-high"] > hint.scores["basic-high"] > 0 and hint.suggested == "all-high"
    list(hinted.run())
    for name, outcome in plain.outcomes().items():
        assert hinted.outcomes()[name].scores == outcome.scores


def test_a_masked_model_is_measured_on_the_masks_that_it_trains_on(tiny, pairs, tmp_path):
    comparison = comparison_of(
        tiny("bert"), pairs, tmp_path / "c", presets=["basic"], layers=["all"], flags={"batch_size": 4}
    )
    (one,) = comparison.ahead.candidates
    rows, tokenizer, vocab = comparison.rows, comparison.tokenizer, comparison.shared.base.found.vocab_size
    job = job_for(
        tiny("bert"),
        tmp_path / "r",
        data=(str(pairs),),
        preset="basic",
        batch_size=4,
        holdout=0.2,
        data_seed=0,
    )
    for number, found in enumerate(micro_batches_of(rows, one.config, "masked", tokenizer, range(4), vocab)):
        wanted = job.micro_batch(number, 0)
        assert torch.equal(found.inputs["input_ids"], wanted.inputs["input_ids"])
        assert torch.equal(found.labels, wanted.labels) and found.supervised == wanted.supervised
    comparison.hints = True
    assert next(comparison.run()).scores
