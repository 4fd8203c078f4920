import json
import math
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build_model, tokenizer
from jobs import events_of, job_for, losses
from peft import PeftModel
from safetensors.torch import load_file

from lorafit.adapter.folder import CONFIG, WEIGHTS
from lorafit.adapter.inject import attach
from lorafit.data.collate import collate_rows
from lorafit.errors import Interrupted, RequestError, RunError
from lorafit.events import Evaluated, Saved, Stepped, TrainReport
from lorafit.forward.head import Forward
from lorafit.model.chart import chart_of
from lorafit.model.load import pick_device, pick_dtype
from lorafit.model.source import find
from lorafit.settings.precedence import settle
from lorafit.train.job import load_base
from lorafit.train.loggers import recorded
from lorafit.train.loop import run
from lorafit.train.measure import efficiency, matrix_rate, peak_memory
from lorafit.train.run_folder import RunFolder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_learns_and_loads_in_plain_peft(tiny, pairs, tmp_path, family):
    """The loss falls, and what is saved gives the same logits through PEFT's own loader."""
    output = tmp_path / "run"
    job = job_for(
        tiny(family),
        output,
        data=(str(pairs),),
        preset="all",
        layers="last:2",
        max_steps=12,
        batch_size=8,
        learning_rate=2e-2,
        max_length=100,
        sample=True,
    )
    report = events_of(job)[-1]
    assert isinstance(report, TrainReport) and report.steps == 12 and report.sample
    assert report.eval["after"].loss < report.eval["before"].loss - 0.1

    batch = collate_rows(list(job.rows.held_out), job.tokenizer.pad_token_id or 0, job.task)
    forward = Forward.of(job.model, job.task)
    job.model.eval()
    with torch.no_grad():
        wanted = forward.logits(job.model, batch)
        plain = PeftModel.from_pretrained(
            type(job.model.get_base_model()).from_pretrained(tiny(family)), output
        )
        got = forward.logits(plain.eval(), batch)
        attached = attach(type(job.model.get_base_model()).from_pretrained(tiny(family)), output)
        mine = forward.logits(attached.eval(), batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_losses_to_the_bit(tiny, pairs, tmp_path):
    flags = {"data": (str(pairs),), "epochs": 2, "batch_size": 8, "dropout": 0.1}
    one, two = (events_of(job_for(tiny("llama"), tmp_path / n, **flags)) for n in ("a", "b"))
    other = events_of(job_for(tiny("llama"), tmp_path / "c", seed=1, **flags))
    assert losses(one) == losses(two) != losses(other)
    assert load_file(tmp_path / "a" / WEIGHTS).keys() == load_file(tmp_path / "b" / WEIGHTS).keys()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert (tmp_path / "a" / CONFIG).read_bytes() == (tmp_path / "b" / CONFIG).read_bytes()


def test_a_seed_of_the_data_fixes_the_rows_and_batches_whatever_the_seed(tiny, pairs, tmp_path):
    flags = {"data": (str(pairs),), "batch_size": 8, "holdout": 0.2}
    one, other = (job_for(tiny("llama"), tmp_path / f"{n}", seed=n, data_seed=3, **flags) for n in (0, 1))
    plain = job_for(tiny("llama"), tmp_path / "c", seed=3, **flags)
    assert one.batches == other.batches == plain.batches
    assert one.rows.held_out.digest == other.rows.held_out.digest == plain.rows.held_out.digest
    orders = [[b.key for step in job.micro_batches(1) for b in step] for job in (one, other)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert not torch.equal(one.parameters[0], other.parameters[0])
    assert job_for(tiny("llama"), tmp_path / "d", seed=1, **flags).batches != one.batches


def test_accumulation_is_the_same_step(tiny, pairs, tmp_path):
    """Four micro-batches of two rows or one of eight: the loss counts tokens over the whole step."""
    job = job_for(tiny("llama"), tmp_path / "a", data=(str(pairs),), batch_size=8)
    rows = list(job.rows.train[:8])
    forward = Forward.of(job.model, "causal")
    supervised = sum(r.supervised for r in rows)
    grads = []
    for size in (8, 2):
        job.model.zero_grad()
        for at in range(0, 8, size):
            (
                forward.loss_sum(job.model, collate_rows(rows[at : at + size], 0, "causal")) / supervised
            ).backward()
        grads.append(torch.cat([p.grad.flatten() for p in job.parameters]))
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stop_after", [3, 8, 10])  # ten steps an epoch: also just at its end
def test_a_resumed_run_equals_a_straight_run(tiny, pairs, tmp_path, stop_after):
    flags = {"data": (str(pairs),), "epochs": 2, "batch_size": 4, "dropout": 0.1, "eval_steps": 4}
    straight = events_of(job_for(tiny("llama"), tmp_path / "a", **flags))

    seen = []
    job = job_for(
        tiny("llama"), tmp_path / "b", stop=lambda: 15 if len(seen) >= stop_after - 1 else 0, **flags
    )
    with pytest.raises(Interrupted) as end:
        for event in recorded(job, run(job)):
            seen += [event] if isinstance(event, Stepped) else []
    assert end.value.exit_code == 143 and "--resume" in end.value.hint
    assert not (tmp_path / "b").exists() and job.folder.checkpoints
    resumed = events_of(job_for(tiny("llama"), tmp_path / "b", resume=True, **flags))
    assert losses(resumed)[-3:] == losses(straight)[-3:]
    one, two = straight[-1], resumed[-1]
    assert (one.tokens, one.steps, one.eval) == (two.tokens, two.steps, two.eval)
    assert [(e.epoch, e.loss, e.tokens) for e in one.epochs] == [
        (e.epoch, e.loss, e.tokens) for e in two.epochs
    ]
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert not list((tmp_path / "b").glob("checkpoint-*"))


def test_another_run_cannot_be_resumed(tiny, pairs, tmp_path):
    flags = {"data": (str(pairs),), "epochs": 2, "batch_size": 4, "save_steps": 3, "max_steps": 8}
    job = job_for(tiny("llama"), tmp_path / "b", stop=lambda: 2, **flags)
    with pytest.raises(Interrupted):
        events_of(job)
    with pytest.raises(RequestError, match="`learning_rate` was"):
        events_of(job_for(tiny("llama"), tmp_path / "b", resume=True, learning_rate=1e-5, **flags))
    with pytest.raises(RequestError, match="an unfinished run lies"):
        job_for(tiny("llama"), tmp_path / "b", **flags)


@pytest.mark.parametrize(
    "after, words", [(None, "the held-out loss is nan"), (Evaluated, "the loss is nan at")]
)
def test_a_loss_that_is_no_number_stops_the_run(tiny, pairs, tmp_path, after, words):
    """Before the first step by the held-out rows, later by the step itself; nothing is left behind."""

    def spoil():
        job.parameters[0].data.fill_(math.inf)

    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=3)
    if after is None:
        spoil()
    with pytest.raises(RunError, match=words):
        for event in recorded(job, run(job)):
            if after is not None and isinstance(event, after):
                spoil()
    assert not list(tmp_path.iterdir())


def test_the_old_run_stays_until_the_new_one_is_whole(tiny, pairs, tmp_path):
    flags = {"data": (str(pairs),), "max_steps": 2}
    events_of(job_for(tiny("llama"), tmp_path / "r", **flags))
    old = (tmp_path / "r" / WEIGHTS).read_bytes()
    with pytest.raises(RequestError, match="exists"):
        job_for(tiny("llama"), tmp_path / "r", **flags)
    job = job_for(tiny("llama"), tmp_path / "r", overwrite=True, seed=5, **flags)
    for event in recorded(job, run(job)):
        if isinstance(event, Stepped):
            assert (tmp_path / "r" / WEIGHTS).read_bytes() == old
    assert (tmp_path / "r" / WEIGHTS).read_bytes() != old
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_finished_run_says_what_it_did(tiny, pairs, tmp_path):
    events = events_of(
        job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), epochs=2, batch_size=8, save_steps=4)
    )
    lines = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert len(lines) == len(events) and lines[0]["event"] == "started" and lines[-1]["event"] == "report"
    assert any(isinstance(e, Saved) for e in events)
    report = events[-1]
    steps = [e for e in events if isinstance(e, Stepped)]
    assert report.tokens == sum(e.tokens for e in steps) == sum(e.tokens for e in report.epochs)
    assert report.seconds == pytest.approx(sum(e.seconds for e in steps))
    assert len(report.epochs) == 2 and report.peak_memory_bytes > 10**8


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_checkpointing_keeps_gradients_and_stays_above_the_cut(tiny, pairs, tmp_path, family):
    """Recomputed activations: the same gradients, and no block under the lowest adapter runs backward."""
    grads, ran = [], []
    for on in (False, True):
        job = job_for(
            tiny(family),
            tmp_path / str(on),
            data=(str(pairs),),
            preset="attention",
            layers="3",
            gradient_checkpointing=on,
            batch_size=4,
        )
        blocks = job.model.get_base_model().get_submodule(job.plan.slots[0].stack)
        for block in blocks:
            for module in block.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        calls = []
        for number, block in enumerate(blocks):
            block.register_full_backward_hook(lambda m, i, o, n=number, seen=calls: seen.append(n))
        job.model.train()
        forward = Forward.of(job.model, "causal")
        forward.loss_sum(job.model, collate_rows(list(job.rows.train[:4]), 0, "causal")).backward()
        grads.append(torch.cat([p.grad.flatten() for p in job.parameters]))
        ran.append(set(calls))
    assert torch.equal(*grads)
    assert ran == [{3}, {3}]


def test_devices_that_are_not_there():
    for name in ("cuda:99", "gpu", "meta", "cuda" if not torch.cuda.is_available() else "cuda:77"):
        with pytest.raises(RequestError):
            pick_device(name)
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32


def test_a_masked_model_needs_a_mask_token(pairs, tmp_path):
    folder = tmp_path / "m"
    build_model("bert").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with pytest.raises(RequestError, match="mask token"):
        events_of(job_for(folder, tmp_path / "r", data=(str(pairs),), max_steps=1))
    assert not (tmp_path / "r").exists() and not (tmp_path / "r.partial").exists()


def test_runs_started_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from lorafit.train.run_folder import claim

    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim("demo-basic-all"), range(16)))
    assert len({f.target for f in folders}) == 16 and all(f.work.is_dir() for f in folders)


def test_a_trained_adapter_survives_what_fails_behind_it(tiny, pairs, tmp_path, monkeypatch):
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=2)
    monkeypatch.setattr(RunFolder, "finish", lambda self, keep, best: (_ for _ in ()).throw(OSError("busy")))
    with pytest.raises(RunError, match="busy"):
        events_of(job)
    assert (tmp_path / "r.partial" / WEIGHTS).is_file()


def test_no_share_of_the_matrix_rate_is_above_one():
    assert efficiency(50.0, 100.0, 80.0) == 0.5
    assert efficiency(214.0, 100.0, 90.0) == 1.0
    assert efficiency(50.0, 20.0, 100.0) == 0.5, "the better of both measurements counts"
    assert efficiency(50.0, 0.0) is None


def test_the_rate_of_a_small_product_is_found_in_few_tries(monkeypatch):
    calls, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *tensors: (calls.append(1), linear(*tensors))[1]
    )
    assert matrix_rate(8, 8, torch.float32, torch.device("cpu"), seconds=60) > 0 and len(calls) == 8
    calls.clear()
    assert matrix_rate(8, 8, torch.float32, torch.device("cpu"), seconds=0) > 0 and len(calls) == 1


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_the_share_of_the_matrix_rate_counts_forward_and_backward(tiny, pairs, tmp_path, monkeypatch, cache):
    """Of what the pass computed, at a rate that is stated."""
    from lorafit.estimate import Shape, flops_per_token
    from lorafit.events import EpochDone
    from lorafit.train.job import Job

    monkeypatch.setattr(Job, "matrix_rate", lambda self, seconds=0.15: 1e15)
    job = job_for(
        tiny("llama"),
        tmp_path / "r",
        data=(str(pairs),),
        epochs=2,
        preset="ffn",
        layers="2-",
        prefix_cache=cache,
    )
    done = [e for e in events_of(job) if isinstance(e, EpochDone)]
    assert [e.replayed for e in done] == [cache == "memory"] * 2
    for epoch in done:
        shape = Shape(1, round(epoch.tokens / len(job.rows.train)))
        share = epoch.supervised_tokens / epoch.tokens
        flops = flops_per_token(job.plan, job.found, shape, replayed=epoch.replayed, supervised=share)
        assert min(flops.forward, flops.backward) > 0.2 * (flops.forward + flops.backward)
        wanted = epoch.tokens / epoch.seconds * (flops.forward + flops.backward) / 1e15
        assert epoch.mfu == pytest.approx(wanted, rel=1e-6)


# skipped elsewhere: a process's highest mark can be reset in Linux's /proc alone, and elsewhere loading stays in it
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone resets a process's peak")
def test_the_peak_is_counted_without_the_pages_of_the_models_files(tmp_path):
    """A bfloat16 model in float32: its file is mapped beside the weights while it loads, and the system takes it back."""
    folder = tmp_path / "m"
    build_model("llama", vocab_size=60_000, hidden_size=256).to(torch.bfloat16).save_pretrained(folder)
    source = find(str(folder))
    base = load_base(source, chart_of(source), settle({"model": str(folder), "dtype": "float32"})[0])
    weights = sum(p.nbytes for p in base.model.parameters())
    stored = (folder / "model.safetensors").stat().st_size
    assert stored > 50_000_000 and weights == pytest.approx(2 * stored, rel=0.01)
    assert peak_memory(base.device) - base.before < weights + 0.5 * stored
