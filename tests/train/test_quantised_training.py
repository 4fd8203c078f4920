"""A run on a quantised base: replayed, checkpointed and resumed as on a plain one; what it leaves says so."""

import json
from dataclasses import replace

import pytest
import torch
from families import build_config
from jobs import events_of, job_for, losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafit import cache
from lorafit.adapter import WEIGHTS, inject_plan, recorded_quantize, resolve
from lorafit.errors import LorafitError, RequestError
from lorafit.estimate.simulate import _profile, meta_batch, simulate_step, track
from lorafit.estimate.terms import Shape
from lorafit.events import EpochDone, PrefixCache, Stepped
from lorafit.forward import Forward, states_key
from lorafit.model import chart_of, find, load_model
from lorafit.settings import load_preset, read_yaml
from lorafit.train import recorded
from lorafit.train import run as run_job

KINDS = ["nf4", "int8"]


def job(tiny, pairs, output, kind, family="llama", **flags):
    settings = {
        "data": (str(pairs),), "preset": "all", "layers": "last:2", "epochs": 3, "batch_size": 4, "max_length": 100,
        "prefix_cache": "off", "quantize": kind, **flags,
    }  # fmt: skip
    return job_for(tiny(family), output, **settings)


def adapter_of(folder):
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_trains_the_same_adapter_to_the_bit(kind, dtype, tiny, pairs, tmp_path):
    plain = events_of(job(tiny, pairs, tmp_path / "off", kind, dtype=dtype))
    for where in ("memory", "disk", "disk"):  # the second time the states are found there
        output = tmp_path / f"{where}-{len(list(tmp_path.iterdir()))}"
        events = events_of(job(tiny, pairs, output, kind, dtype=dtype, prefix_cache=where))
        assert losses(events) == losses(plain) and adapter_of(output) == adapter_of(tmp_path / "off")
        assert next(e for e in events if isinstance(e, PrefixCache)).where == where
        assert [e.replayed for e in events if isinstance(e, EpochDone)][-1]
    assert len(list(cache.folder("prefix").glob("*/states.bin"))) >= 1


def test_states_of_one_kind_are_not_those_of_another(tiny, pairs, tmp_path):
    keys = {
        states_key(made.model.get_base_model(), "model.layers", 2, ["rows"], made.fingerprint)
        for kind in ("none", *KINDS)
        for made in [job(tiny, pairs, tmp_path / kind, kind)]
    }
    assert len(keys) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing_and_backward_stops_at_the_cut(kind, tiny, pairs, tmp_path):
    plain = events_of(job(tiny, pairs, tmp_path / "plain", kind, epochs=1))
    made = job(tiny, pairs, tmp_path / "less", kind, epochs=1, gradient_checkpointing=True)
    reached = []
    for number, block in enumerate(made.model.get_base_model().model.layers):
        block.register_full_backward_hook(lambda *_, n=number: reached.append(n))
    assert losses(events_of(made)) == losses(plain)
    assert adapter_of(tmp_path / "less") == adapter_of(tmp_path / "plain")
    assert set(reached) == {2, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_a_straight_one(kind, tiny, pairs, tmp_path):
    flags = {"save_steps": 3, "quantize": kind}
    straight = events_of(job(tiny, pairs, tmp_path / "straight", kind, **flags))
    taken = []
    made = job(tiny, pairs, tmp_path / "stopped", kind, stop=lambda: 15 if len(taken) >= 8 else 0, **flags)
    with pytest.raises(LorafitError):
        for event in recorded(made, run_job(made)):
            taken += [event] if isinstance(event, Stepped) else []
    with pytest.raises(RequestError, match=f"`quantize` was '{kind}', is 'none'"):
        events_of(job(tiny, pairs, tmp_path / "stopped", "none", save_steps=3, resume=True))
    resumed = events_of(job(tiny, pairs, tmp_path / "stopped", kind, resume=True, **flags))
    steps = [e.loss for e in straight if isinstance(e, Stepped)]
    assert [e.loss for e in resumed if isinstance(e, Stepped)] == steps[len(taken) :]
    assert adapter_of(tmp_path / "stopped") == adapter_of(tmp_path / "straight")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_what_it_leaves_says_how_its_base_was_held(kind, run, tiny, pairs, tmp_path):
    folder = tmp_path / "r"
    done = run(
        "train",
        tiny("llama"),
        "--data",
        pairs,
        "--quantize",
        kind,
        "--preset",
        "all",
        "--epochs",
        4,
        "--batch-size",
        4,
        "-o",
        folder,
        "--json",
    )
    assert done.code == 0, done.err
    loss = done.document["eval"]
    assert loss["after"]["loss"] < loss["before"]["loss"]
    assert json.loads((folder / "base.json").read_text())["quantize"] == recorded_quantize(folder) == kind
    assert read_yaml(folder / "run.yaml", "run file")["quantize"] == kind
    assert (
        f"| base weights in training | {kind}, quantised by bitsandbytes |"
        in (folder / "README.md").read_text()
    )
    assert all(t.dtype == torch.float32 for t in load_file(folder / WEIGHTS).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_simulated_step_holds_what_a_real_one_holds(kind, family, tmp_path):
    """The trace of a step on meta, where layers pretend to be quantised, and with weights that are: wide ones
    and few tokens, so that what is dequantised counts."""
    wide = (
        {"n_embd": 128, "n_inner": 2048}
        if family == "gpt2"
        else {"hidden_size": 128, "intermediate_size": 2048}
    )
    model = AutoModelForCausalLM.from_config(build_config(family, **wide))
    model.save_pretrained(tmp_path)
    source, shape = find(str(tmp_path)), Shape(1, 16, supervised=0.5, quantize=kind)
    found = chart_of(source)
    plan = resolve(found, load_preset("all"), "last:2")
    held = inject_plan(load_model(source, torch.float32, torch.device("cpu"), kind), plan, found.task).train()
    batch = meta_batch(shape, found.task, "cpu")
    batch = replace(batch, inputs={**batch.inputs, "input_ids": torch.randint(3, 800, (1, 16))})
    real = _profile(track(held, plan, Forward.of(held, found.task), batch, "cpu"), shape, "")
    peaks = [
        p.activations + p.logits + p.workspace
        for p in (
            real,
            simulate_step(source, found, plan, shape, "cpu", whole_depth=True),
            simulate_step(source, found, plan, replace(shape, quantize="none"), "cpu", whole_depth=True),
        )
    ]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02) and peaks[0] > 1.2 * peaks[2]
