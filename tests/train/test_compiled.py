"""`--compile`: the same training from compiled blocks, or an error before the first step."""

import re

import pytest
import torch
from jobs import events_of, job_for, losses
from safetensors.torch import load_file

from lorafit.adapter import WEIGHTS
from lorafit.errors import RequestError
from lorafit.events import Compiling
from lorafit.forward.compiling import Compiled


def job(tiny, pairs, output, family="llama", **flags):
    settings = {
        "data": (str(pairs),), "preset": "all", "layers": "last:2", "epochs": 2, "batch_size": 8, "max_length": 100, **flags,
    }  # fmt: skip
    return job_for(tiny(family), output, **settings)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 drops out in training
def test_a_compiled_run_trains_the_same(family, tiny, pairs, tmp_path, monkeypatch):
    ran = []
    plain_forward = Compiled.forward
    monkeypatch.setattr(
        Compiled, "forward", lambda self, *a, **k: (ran.append(1), plain_forward(self, *a, **k))[1]
    )
    plain = events_of(job(tiny, pairs, tmp_path / "plain", family))
    assert not ran
    made = job(tiny, pairs, tmp_path / "compiled", family, compile=True)
    events = events_of(made)
    done = next(e for e in events if isinstance(e, Compiling) and e.done)
    assert done.blocks == 2 and done.off < 1e-5
    # two blocks in each micro-batch of the steps and of the check, and in no pass over the held-out rows
    assert len(ran) == 2 * (2 * len(made.batches) + 1)
    assert losses(events) == pytest.approx(losses(plain), abs=1e-5)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("compiled", "plain"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=0)


def nothing_reaches_it(block):
    return lambda *inputs, **named: block(*inputs, **named).detach()


def one_matrix_is_left_out(block):
    weight = block.self_attn.q_proj.lora_A["default"].weight

    def forward(*inputs, **named):
        weight.requires_grad_(False)
        hidden = block(*inputs, **named)
        weight.requires_grad_(True)
        return hidden

    return forward


def a_little_too_long(block):
    return lambda *inputs, **named: 1.001 * block(*inputs, **named)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (nothing_reaches_it, "no gradient reaches what is trained"),
        (one_matrix_is_left_out, "q_proj.lora_A.default.weight` gets no gradient"),
        (a_little_too_long, "the gradient is off by"),
    ],
)
def test_a_gradient_that_is_not_the_plain_one_is_an_error_before_the_first_step(
    wrong, said, tiny, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda block, dynamic: wrong(block))
    made = job(tiny, pairs, tmp_path / "r", compile=True)
    start = [p.clone() for p in made.parameters]
    with pytest.raises(RequestError, match=f"--compile.*{re.escape(said)}"):
        events_of(made)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(start, made.parameters, strict=True))
    assert not (tmp_path / "r").exists()


def test_a_block_that_cannot_be_compiled_is_an_error_with_the_reason(tiny, pairs, tmp_path, monkeypatch):
    def breaks(graph, inputs):
        raise RuntimeError("no compiler here")

    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda block, dynamic: compiler(block, dynamic=dynamic, backend=breaks)
    )
    with pytest.raises(RequestError, match=r"--compile: .*no compiler here") as error:
        events_of(job(tiny, pairs, tmp_path / "r", compile=True))
    assert "--compile" in error.value.hint


def test_what_is_not_compiled_is_refused_before_the_model_is_loaded(run, tiny, pairs, tmp_path):
    for more, said in (
        (["--quantize", "nf4"], "nf4"),
        (["--quantize", "nf4", "--matrix"], "nf4"),
        (["--shard"], "shard"),
    ):
        words = ["plan", tiny("llama"), "--data", pairs, "--compile", *more, "--processes", 2]
        got = run(*words)
        assert got.code == 2 and "--compile" in got.err and said in got.err, got.err
    got = run("compare", tiny("llama"), "--data", pairs, "--compile")
    assert got.code == 2 and "--compile" in got.err
    got = run("plan", tiny("llama"), "--data", pairs, "--compile")
    assert got.code == 0 and "compiling comes on top" in " ".join(got.err.split() + got.out.split())
