"""A simulated step against a real one, and what is extended against what is not."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, build_config
from jobs import job_for
from transformers import Gemma3nTextConfig

from lorafit.adapter.plan import resolve
from lorafit.estimate import simulate
from lorafit.estimate.simulate import _profile, alike, meta_batch, simulate_step, track
from lorafit.estimate.terms import Shape
from lorafit.forward.head import Forward
from lorafit.model.chart import chart_of
from lorafit.model.source import ModelSource, find
from lorafit.settings.preset import load_preset


def peak(profile):
    return profile.activations + profile.logits + profile.workspace


def named(config, name="model"):
    return ModelSource(name, name, config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_simulated_step_holds_what_a_real_one_holds(tiny, pairs, tmp_path, family):
    """The same tracker over the model on meta and over the model with its weights: peak and FLOPs."""
    job = job_for(
        tiny(family), tmp_path / "run", data=(str(pairs),), preset="all", layers="last:2", batch_size=4,
        max_length=100, dropout=0.0,
    )  # fmt: skip
    source = find(str(tiny(family)))
    shape = Shape(4, 64, supervised=0.5)
    batch = meta_batch(shape, job.task, "cpu")
    batch = replace(batch, inputs={**batch.inputs, "input_ids": torch.randint(3, 800, (4, 64))})
    forward = Forward.of(job.model, job.task)
    job.model.train()
    real = _profile(track(job.model, job.plan, forward, batch, "cpu"), shape, "")
    found = simulate_step(source, job.found, job.plan, shape, "cpu", whole_depth=True)
    assert peak(found) == pytest.approx(peak(real), rel=0.005)
    assert (found.forward, found.backward) == pytest.approx((real.forward, real.backward), rel=0.005)


BANDS = ("low", "mid", "high", "all")
DEPTHS = [("llama", band) for band in BANDS] + [
    pytest.param(family, band, marks=[pytest.mark.long] if band != "mid" else [])
    for family in ("gemma2", "qwen3_moe", "deepseek_v3", "qwen3_next")
    for band in BANDS
]


@pytest.mark.parametrize("family, band", DEPTHS)
def test_what_is_extended_agrees_with_the_whole_depth(family, band):
    kinds = ["linear_attention", "full_attention"] * 8
    config = build_config(
        family, num_hidden_layers=16, **({"layer_types": kinds} if family == "qwen3_next" else {})
    )
    source = named(config)
    found = chart_of(source)
    parts = ["feed-forward", "shared-experts"] if found.reinterpreted else []
    plan = resolve(found, load_preset("all"), band, exclude=parts)
    for shape in (Shape(2, 64), Shape(2, 64, "bfloat16", checkpointing=True)):
        short = simulate_step(source, found, plan, shape, "cpu")
        whole = simulate_step(source, found, plan, shape, "cpu", whole_depth=True)
        assert (short.forward, short.backward, short.prefix) == pytest.approx(
            (whole.forward, whole.backward, whole.prefix), rel=1e-6, abs=2
        )
        assert peak(short) == pytest.approx(peak(whole), rel=0.01)
        if family in (
            "llama",
            "gemma2",
            "qwen3_moe",
        ):  # blocks of two kinds come kind by kind: in another order
            assert short.heap == pytest.approx(whole.heap, abs=0.02 * peak(whole))


def test_how_a_model_is_called_is_tried_once_for_all_bands(monkeypatch):
    """A head that is trained is called in another way, and so is tried again."""
    source = named(build_config("llama", num_hidden_layers=6, tie_word_embeddings=False))
    found, tried, of = chart_of(source), [], Forward.of
    monkeypatch.setattr(simulate, "_WAYS", {})
    monkeypatch.setattr(Forward, "of", lambda *given: (tried.append(1), of(*given))[1])
    plans = [resolve(found, load_preset("ffn"), band) for band in ("mid", "high")]
    alone = [simulate_step(source, found, plan, Shape(2, 64), "cpu", whole_depth=True) for plan in plans]
    assert len(tried) == 1
    lora = replace(load_preset("ffn").lora, modules_to_save=("lm_head",))
    whole = resolve(found, replace(load_preset("ffn"), lora=lora), "mid")
    simulate_step(source, found, whole, Shape(2, 64), "cpu", whole_depth=True)
    assert len(tried) == 2 and [way.head for way in simulate._WAYS.values()] == ["apart", "inside"]
    simulate._WAYS.clear()
    assert simulate_step(source, found, plans[1], Shape(2, 64), "cpu", whole_depth=True) == alone[1]


def test_an_embedding_with_a_part_for_each_layer_needs_them_all():
    config = Gemma3nTextConfig(
        vocab_size=256, vocab_size_per_layer_input=256, hidden_size=32, intermediate_size=48, num_hidden_layers=40,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, num_kv_shared_layers=16,
        hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 40,
    )  # fmt: skip
    source = named(config)
    found = chart_of(source)
    plan = resolve(found, load_preset("attention"), "high")
    made = simulate_step(source, found, plan, Shape(2, 64), "cpu")
    assert alike(source, found, plan) == {} and made.forward > made.prefix > 0


def test_an_error_without_a_word_is_an_error_of_the_simulation(monkeypatch):
    def fails(*_, **__):
        raise AssertionError

    monkeypatch.setattr(simulate, "track", fails)
    source = named(build_config("llama"))
    found = chart_of(source)
    with pytest.raises(simulate.NotSimulated, match="AssertionError"):
        simulate_step(source, found, resolve(found, load_preset("all"), "high"), Shape(2, 64), "cpu")


def test_fewer_key_heads_are_counted_on_a_gpu_too(monkeypatch):
    """PyTorch's own counter refused them before 2.12, and formulas stood in for the simulation."""
    from torch.utils import flop_counter

    def refuses(*_, **__):
        raise AssertionError("shapes are incompatible")

    monkeypatch.setattr(flop_counter, "sdpa_flop_count", refuses)
    source = named(build_config("llama", num_attention_heads=4, num_key_value_heads=2))
    found = chart_of(source)
    plan = resolve(found, load_preset("all"), "high")
    made = {
        device: simulate_step(source, found, plan, Shape(2, 64, "bfloat16"), device)
        for device in ("cpu", "cuda")
    }
    assert made["cuda"].forward == made["cpu"].forward and made["cuda"].backward == made["cpu"].backward


def test_eager_attention_keeps_its_scores():
    source = named(build_config("llama"))
    found = chart_of(source)
    plan = resolve(found, load_preset("all"), "all")
    fused, eager = (
        simulate_step(source, found, plan, Shape(2, 128, attention=name), "cpu") for name in ("auto", "eager")
    )
    heads = source.config["num_attention_heads"]
    assert eager.activations - fused.activations > found.text_stacks[0].depth * 2 * heads * 128 * 128 * 4


def test_flops_are_those_of_the_hand_formula():
    """Per token: two a weight forward, twice the attention's square; backward the same for the inputs
    at and above the cut, the adapters' own four, and attention's five products for two."""
    layers, hidden, inner, vocabulary, length = 8, 64, 128, 896, 32
    config = build_config(
        "llama", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16,
    )  # fmt: skip
    source = named(config)
    found = chart_of(source)
    plan = resolve(found, load_preset("all"), "all")
    profile = simulate_step(source, found, plan, Shape(2, length), "cpu", whole_depth=True)
    block = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    attention = 4 * length * hidden
    lora = 2 * plan.trainable_params
    head = 2 * hidden * vocabulary
    assert profile.forward == layers * (block + attention) + lora + head
    # the lowest block's q, k, v need no gradient of their input through the base weights
    # but through what stands below them nothing is trained: that part of backward is left out
    whole = layers * (block + attention * 5 // 2) + 2 * lora + head
    lowest = 2 * 3 * hidden * hidden + plan.lora.r * 2 * 3 * hidden
    assert profile.backward == whole - lowest


def test_the_prefix_is_the_part_of_forward_below_the_cut():
    source = named(build_config("llama", num_hidden_layers=12))
    found = chart_of(source)
    shapes = Shape(2, 64)
    high = simulate_step(source, found, resolve(found, load_preset("ffn"), "high"), shapes, "cpu")
    low = simulate_step(source, found, resolve(found, load_preset("ffn"), "low"), shapes, "cpu")
    assert low.prefix == 0 and high.prefix * 3 > high.forward > high.prefix
    assert high.backward < low.backward and not high.refusal and "layer 0" in low.refusal


def test_checkpointing_holds_less_and_computes_more():
    source = named(build_config("llama", num_hidden_layers=12))
    found = chart_of(source)
    plan = resolve(found, load_preset("all"), "all")
    plain = simulate_step(source, found, plan, Shape(2, 128), "cpu")
    again = simulate_step(source, found, plan, Shape(2, 128, checkpointing=True), "cpu")
    assert peak(again) < 0.5 * peak(plain) and again.backward > 1.3 * plain.backward
