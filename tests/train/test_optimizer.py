"""The optimizers of the table: what each keeps, and which package brings it."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from jobs import events_of, job_for

from lorafit.errors import RequestError
from lorafit.events import Note
from lorafit.settings import OPTIMIZERS, PACKAGES, optimizers, settle
from lorafit.train.optimizer import KINDS, make_optimizer


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(8, 640)), torch.nn.Parameter(torch.randn(512, 8))]


def here(name):
    return name not in PACKAGES or find_spec(PACKAGES[name]) is not None


def test_every_name_has_a_maker_and_a_size():
    assert tuple(KINDS) == OPTIMIZERS and OPTIMIZERS[0] == settle({})[0].optimizer == "adamw"


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if here(n)])
def test_an_optimizer_lowers_a_loss_and_keeps_what_it_says(name):
    own = parameters()
    optimizer = make_optimizer(replace(settle({"optimizer": name})[0], weight_decay=0.01), own)
    losses = []
    for _ in range(20):
        loss = sum((p * p).sum() for p in own)
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    tensors = [
        v
        for p in own
        for key, v in optimizer.state.get(p, {}).items()
        if isinstance(v, torch.Tensor) and v.ndim and not key.startswith("qmap")  # two tables for all of them
    ]
    kept, stated = (
        sum(v.numel() * v.element_size() for v in tensors),
        KINDS[name].state_bytes(sum(p.numel() for p in own)),
    )
    assert kept <= stated and (name == "adafactor" or kept >= 0.9 * stated)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    name, run, tiny, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(optimizers, "find_spec", lambda package: None)
    done = run("train", tiny("llama"), "--data", pairs, "--optimizer", name, "-o", tmp_path / "r")
    assert done.code == 2 and f"--optimizer {name} needs `bitsandbytes`" in done.err
    assert "pip install bitsandbytes" in done.err and not list(tmp_path.iterdir())
    done = run("plan", tiny("llama"), "--optimizer", name)
    assert done.code == 2 and "which is not installed" in done.err
    with pytest.raises(RequestError, match="bitsandbytes"):
        make_optimizer(replace(settle({})[0], optimizer=name), parameters())


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_a_run_with_it_learns_and_its_file_repeats_it(name, tiny, pairs, tmp_path):
    rate = {"adafactor": 2e-2, "sgd": 2.0}[name]
    job = job_for(
        tiny("llama"), tmp_path / "r", data=(str(pairs),), optimizer=name, learning_rate=rate, epochs=4, preset="all",
        batch_size=4,
    )  # fmt: skip
    report = events_of(job)[-1]
    assert report.eval["after"].loss < report.eval["before"].loss - 0.05
    assert settle({}, str(tmp_path / "r" / "run.yaml"))[0].optimizer == name


def test_the_estimate_asks_for_the_state(run, tiny):
    def memory(name):
        words = (
            "plan",
            tiny("llama"),
            "--no-probe",
            "--batch-size",
            2,
            "--max-length",
            64,
            "--optimizer",
            name,
        )
        document = run(*words, "--json").document
        return document["estimate"]["memory"]["optimizer"], document["trainable_params"]

    adamw, count = memory("adamw")
    sgd, _ = memory("sgd")
    assert (adamw, sgd) == (8 * count + 4 * count, 4 * count)


def test_a_derived_rate_that_is_none_for_the_optimizer_is_noted(tiny, pairs, tmp_path):
    flags = {"data": (str(pairs),), "max_steps": 1, "optimizer": "sgd"}
    notes = [
        e.text for e in events_of(job_for(tiny("llama"), tmp_path / "r", **flags)) if isinstance(e, Note)
    ]
    assert len(notes) == 1 and "is derived for AdamW; sgd needs a higher one" in notes[0]
    flags["learning_rate"] = 1.0
    assert not [e for e in events_of(job_for(tiny("llama"), tmp_path / "s", **flags)) if isinstance(e, Note)]


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if here(n)])
def test_weights_decay_by_rate_times_decay(name):
    """Where the gradient is 0 nothing else moves them."""
    own = parameters()
    before = [p.detach().clone() for p in own]
    optimizer = make_optimizer(replace(settle({"optimizer": name})[0], weight_decay=0.2), own)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for was, parameter in zip(before, own, strict=True):
        torch.testing.assert_close(parameter.detach(), 0.9 * was)
