"""Nothing lost: runs that are killed, stopped, full or mad, and what is left of them."""

import json
import random
import re
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import events_of, job_for
from safetensors.torch import load_file

from lorafit import digests
from lorafit.adapter import tokenizer_files
from lorafit.adapter.folder import WEIGHTS, read_config
from lorafit.errors import RequestError, RunError
from lorafit.events import Started, Stepped, TrainReport
from lorafit.train import loggers, loop
from lorafit.train.checkpoint import trainable
from lorafit.train.loggers import recorded
from lorafit.train.run_folder import LAST_GOOD, RunFolder

# Python for a process that kills itself inside a save: while the checkpoint of that step is written.
KILLED_INSIDE = """
import signal
seal_of = digests.seal
def seal(folder, but=()):
    if folder.name == ".checkpoint-{}":
        os.kill(os.getpid(), signal.SIGKILL)
    seal_of(folder, but)
digests.seal = seal
"""


def command(tiny, pairs, output, *more: object) -> list[str]:
    words = [
        "train", tiny("llama"), "--data", pairs, "--preset", "all", "--layers", "2-3", "--dropout", "0.1",
        "--epochs", "4", "--batch-size", "4", "--save-steps", "2", "--eval-steps", "5", "-o", output, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tiny, pairs, tmp_path, forked):
    def code_of(output, *more, kill_after=None, inside=0):
        first = KILLED_INSIDE.format(inside) if inside else ""
        done = forked.run(*command(tiny, pairs, output, *more), kill_after=kill_after, first=first)
        assert done.returncode in (0, -9), done.stderr
        return done.returncode

    assert code_of(tmp_path / "whole") == 0
    started = time.perf_counter()
    assert code_of(tmp_path / "again") == 0
    lasted = time.perf_counter() - started
    draw = random.Random(2)
    kills = runs = 0
    while kills < 20:
        output = tmp_path / f"killed-{runs}"
        runs += 1
        code = -9
        for _ in range(60):
            inside = draw.randrange(2, 36, 2) if draw.random() < 0.3 else 0
            after = None if inside else draw.uniform(0.1, lasted)
            code = code_of(output, "--resume", kill_after=after, inside=inside)
            if code == 0:
                break
            kills += 1
        assert code == 0 and same(output, tmp_path / "whole")
        assert not output.with_name(output.name + ".partial").exists()
        lines = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
        steps = [e["step"] for e in lines if e["event"] == "step"]
        assert steps == list(range(1, len(steps) + 1)) and lines[-1]["event"] == "report"
        wanted = json.loads((tmp_path / "whole" / "events.jsonl").read_text().splitlines()[-1])
        assert lines[-1]["eval"] == wanted["eval"] and lines[-1]["steps"] == wanted["steps"]
        before = (output / "events.jsonl").read_bytes()
        assert code_of(output, "--resume") == 0  # it is finished: nothing changes
        assert (output / "events.jsonl").read_bytes() == before


def stopped(tiny, pairs, folder, at=6, **more):
    """A run that was interrupted after so many steps."""
    from lorafit.errors import Interrupted

    seen = []
    flags = {"data": (str(pairs),), "epochs": 2, "batch_size": 4, "save_steps": 2, "eval_steps": None, **more}
    job = job_for(tiny("llama"), folder, **{k: v for k, v in flags.items() if v is not None})
    job.stop = lambda: 2 if len(seen) >= at else 0
    with pytest.raises(Interrupted) as stop:
        from lorafit.train.loggers import recorded
        from lorafit.train.loop import run

        for event in recorded(job, run(job)):
            seen += [event] if isinstance(event, Stepped) else []
    assert "--resume" in stop.value.hint
    return flags


def test_damaged_checkpoints_are_passed_over(tiny, pairs, tmp_path):
    flags = stopped(tiny, pairs, tmp_path / "r", keep=3)
    flags = {k: v for k, v in flags.items() if v is not None}
    work = tmp_path / "r.partial"
    assert [p.name for p in RunFolder(tmp_path / "r").checkpoints] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    path = work / "checkpoint-6" / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(bytes(raw))
    events = events_of(job_for(tiny("llama"), tmp_path / "r", resume=True, **flags))
    started = next(e for e in events if isinstance(e, Started))
    assert started.resumed_at == 4 and "optimizer.safetensors" in started.damaged[0]
    events_of(job_for(tiny("llama"), tmp_path / "whole", **flags))
    assert same(tmp_path / "r", tmp_path / "whole")
    assert len(list((tmp_path / "r").glob("checkpoint-*"))) == 3  # what --keep asks for stays
    flags = {k: v for k, v in stopped(tiny, pairs, tmp_path / "s").items() if v is not None}
    for path in (tmp_path / "s.partial").glob("checkpoint-*/state.json"):
        path.write_text(path.read_text().replace('"step"', '"stop"'))
    with pytest.raises(RequestError, match="no checkpoint is whole"):
        events_of(job_for(tiny("llama"), tmp_path / "s", resume=True, **flags))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"learning_rate": 1e-3}, "`learning_rate` was"), ({"epochs": 3}, "`epochs` was 2, is 3"), ({"layers": "high"}, "`layers` was"),
        ({"preset": "ffn"}, "`preset` was"), ({"seed": 5}, "`seed` was 0, is 5"), ({"data": None}, "training rows differ"),
        ({"weight_decay": 0.1}, "`weight_decay` was 0.0, is 0.1"), ({"max_grad_norm": 0.5}, "`max_grad_norm` was"),
        ({"optimizer": "sgd"}, "`optimizer` was 'adamw', is 'sgd'"), ({"modules": ("q_proj,k_proj",)}, "adapted modules differ"),
        ({"rank": 4}, "`rank` was"), ({"loss_on": "all"}, "training rows differ"),
    ],
)  # fmt: skip
def test_another_run_is_not_resumed(tiny, pairs, tmp_path, change, words):
    flags = {k: v for k, v in stopped(tiny, pairs, tmp_path / "r").items() if v is not None}
    if change == {"data": None}:
        other = tmp_path / "other.jsonl"
        other.write_text(pairs.read_text().replace("a", "e", 3))
        change = {"data": (str(other),)}
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "r.partial").rglob("*"))
    with pytest.raises(RequestError, match=words):
        events_of(job_for(tiny("llama"), tmp_path / "r", resume=True, **{**flags, **change}))
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "r.partial").rglob("*"))
    # how often to save may change
    events = events_of(
        job_for(tiny("llama"), tmp_path / "r", resume=True, **{**flags, "save_steps": 3, "save_minutes": 1.0})
    )
    assert isinstance(events[-1], TrainReport)


def test_other_base_weights_are_another_run(tiny, pairs, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)
    seen = stopped(lambda name: base, pairs, tmp_path / "r")
    flags = {k: v for k, v in seen.items() if v is not None}
    path = base / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(RequestError, match="base weights differ"):
        events_of(job_for(base, tmp_path / "r", resume=True, **flags))


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_every_optimizer_is_resumed_to_the_bit(tiny, pairs, tmp_path, optimizer):
    """Its state is kept exactly: numbers as numbers, tensors as tensors."""
    flags = stopped(tiny, pairs, tmp_path / "r", optimizer=optimizer, weight_decay=0.1, learning_rate=1e-2)
    flags = {k: v for k, v in flags.items() if v is not None}
    resumed = events_of(job_for(tiny("llama"), tmp_path / "r", resume=True, **flags))
    straight = events_of(job_for(tiny("llama"), tmp_path / "whole", **flags))
    assert next(e for e in resumed if isinstance(e, Started)).resumed_at == 6
    assert same(tmp_path / "r", tmp_path / "whole")
    assert (
        resumed[-1].eval["after"].loss == straight[-1].eval["after"].loss < straight[-1].eval["before"].loss
    )


def test_a_checkpoint_keeps_an_optimizers_state_as_it_is(tiny, pairs, tmp_path):
    """Tensors that parameters share, bytes, and numbers that float32 would round."""
    from lorafit.train.checkpoint import restore, save_checkpoint

    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=1)
    optimizer = torch.optim.SGD(job.parameters, lr=1.0)
    table = torch.linspace(-1, 1, 256)
    for n, parameter in enumerate(job.parameters):
        optimizer.state[parameter] = {
            "step": 2**40 + n, "share": 1 / 3, "table": table,
            "state1": torch.arange(300, dtype=torch.uint8), "absmax": torch.rand(2),
        }  # fmt: skip
    wanted = [dict(optimizer.state[p]) for p in job.parameters]
    path = save_checkpoint(tmp_path / "c", 1, job.model, optimizer, {})
    other = torch.optim.SGD(job.parameters, lr=1.0)
    restore(path, job.model, other)
    for parameter, right in zip(job.parameters, wanted, strict=True):
        got = other.state[parameter]
        assert got.keys() == right.keys()
        for key, value in right.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(got[key], value) and got[key].dtype == value.dtype
            else:
                assert got[key] == value and type(got[key]) is type(value)
    assert optimizer.state[job.parameters[0]]["table"].data_ptr() == table.data_ptr()


def test_a_finished_run_asked_for_more_is_refused(tiny, pairs, tmp_path, run):
    words = ["train", tiny("llama"), "--data", pairs, "--batch-size", 8, "-o", tmp_path / "r", "--epochs", 1]
    assert run(*words).code == 0
    before = (tmp_path / "r" / "events.jsonl").read_bytes()
    same = run(*words, "--resume")
    assert same.code == 0 and "nothing to resume" in same.err
    assert run(*words, "--resume", "--save-steps", 3).code == 0  # how it is saved may differ
    for more, text in (
        (("--epochs", 3), "--epochs was `1`, is `3`"),
        (("--weight-decay", 0.1), "--weight-decay was `0.0`, is `0.1`"),
        (("--max-steps", 2), "--max-steps was not given, is `2`"),
        (("--overflow", "drop"), "--overflow was `truncate`, is `drop`"),
        (("--optimizer", "sgd"), "--optimizer was `adamw`, is `sgd`"),
    ):
        done = run(*words, "--resume", *more)
        assert done.code == 2 and text in " ".join(done.err.split())
        assert "another -o" in done.err and "--overwrite" in done.err
    assert (tmp_path / "r" / "events.jsonl").read_bytes() == before
    (tmp_path / "notes").mkdir()
    done = run("train", tiny("llama"), "--data", pairs, "-o", tmp_path / "notes", "--resume")
    assert done.code == 2 and "is not a run" in done.err


def test_a_checkpoint_of_an_unfinished_run_has_its_template_and_its_end(tiny, pairs, tmp_path, run):
    """What was learned to be the turns' form and their end goes with the checkpoint into a model."""
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    )
    job = job_for(
        tiny("llama"), tmp_path / "r", data=(str(pairs),), preset="ffn", layers="last:1", max_length=64, save_steps=1,
        epochs=1, chat_template=str(tmp_path / "mine.jinja"), as_chat=True,
    )  # fmt: skip
    events = recorded(job, loop.run(job))
    next(event for event in events if isinstance(event, Stepped) and event.step == 2)
    job.folder.release()
    checkpoint = tmp_path / "r.partial" / "checkpoint-1"
    done = run("merge", checkpoint, "-o", tmp_path / "m")
    assert done.code == 0, done.err
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == (tmp_path / "mine.jinja").read_text()
    events.close()


@pytest.mark.parametrize("names", [("tekken.json",), ("odd.codes",)], ids=["a known kind", "any name"])
def test_a_tokenizer_of_other_files_is_no_obstacle(tiny, pairs, tmp_path, monkeypatch, names):
    """Its files lie in the unfinished run from the start."""
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    save = tokenizer_files.save_tokenizer

    def with_more(tokenizer, target):
        for name in names:
            (target / name).write_text("{}")
        return [*save(tokenizer, target), *(name for name in names if name.startswith("odd"))]

    monkeypatch.setattr(loggers, "save_tokenizer", with_more)

    def job(**more):
        return job_for(
            folder, tmp_path / "r", data=(str(pairs),), preset="ffn", layers="last:1", max_length=64, save_steps=1,
            epochs=1, **more,
        )  # fmt: skip

    def ended_early(made):
        events = recorded(made, loop.run(made))
        next(event for event in events if isinstance(event, Stepped) and event.step == 2)
        events.close()

    ended_early(job())
    assert (tmp_path / "r.partial" / names[0]).is_file()
    ended_early(job(overwrite=True))
    events_of(job(resume=True))
    assert (tmp_path / "r" / names[0]).is_file()


def test_a_run_that_was_killed_before_its_file_had_its_name_is_replaced(tiny, pairs, tmp_path):
    (tmp_path / "r.partial").mkdir()
    (tmp_path / "r.partial" / ".run.yaml").write_text("model: m\n")
    job_for(
        tiny("llama"), tmp_path / "r", data=(str(pairs),), preset="ffn", layers="last:1", overwrite=True
    ).folder.release()
    assert [*(tmp_path / "r.partial").iterdir()] == []


def test_what_is_kept_of_a_diverged_run_is_the_last_good_adapter(tiny, pairs, tmp_path):
    """To the bit that of the step it names, in the folder and in the model, and none of what came after."""
    from lorafit.train.loggers import recorded
    from lorafit.train.loop import run

    job = job_for(
        tiny("llama"), tmp_path / "r", data=(str(pairs),), epochs=9, batch_size=4, warmup=0.0,
        scheduler="constant",
    )  # fmt: skip
    job.config = replace(job.config, learning_rate=1e4)
    after: dict[int, list[torch.Tensor]] = {}
    with pytest.raises(RunError) as error:
        for event in recorded(job, run(job)):
            if isinstance(event, Stepped):
                after[event.step] = [p.detach().clone() for p in job.parameters]
    (good,) = re.findall(r"after step (\d+) is saved", error.value.message)
    last = max(after)
    assert int(good) < last and not torch.equal(after[int(good)][1], after[last][1])
    assert all(torch.equal(a, p) for a, p in zip(after[int(good)], job.parameters, strict=True))
    saved = load_file(tmp_path / "r.partial" / LAST_GOOD / WEIGHTS)
    values = [saved[name.replace(".default", "")] for name in trainable(job.model)]
    assert all(torch.equal(a, b) for a, b in zip(after[int(good)], values, strict=True))


def test_the_best_on_the_way_is_kept(tiny, pairs, tmp_path):
    flags = {
        "data": (str(pairs),),
        "epochs": 6,
        "batch_size": 4,
        "eval_steps": 3,
        "learning_rate": 0.2,  # too high: it soon gets worse
        "scheduler": "constant",
        "keep_last": True,
    }
    report = events_of(job_for(tiny("llama"), tmp_path / "r", **flags))[-1]
    evaluated = [
        (e["loss"], e["step"])
        for e in map(json.loads, (tmp_path / "r" / "events.jsonl").read_text().splitlines())
        if e["event"] == "evaluated" and e["step"]
    ]
    assert report.best is not None and (report.best.loss, report.best.step) == min(evaluated)
    (kept,) = (tmp_path / "r").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{report.best.step}"
    digests.check(kept)
    assert read_config(kept)["peft_type"] == "LORA"


def test_two_runs_into_one_folder(tiny, pairs, tmp_path):
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=2)
    for overwrite, resume in ((False, False), (True, False), (False, True)):
        with pytest.raises(RequestError, match="another run is writing"):
            RunFolder(tmp_path / "r").open(overwrite, resume)
    assert events_of(job)[-1].steps == 2


@pytest.mark.parametrize(
    "rate, words, holdout", [(1e4, "step [34]", 0.05), (1e30, "step 2", 0.05), (1e4, "step [34]", 0.0)]
)
def test_a_loss_that_runs_away_stops_with_the_last_good_adapter(tiny, pairs, tmp_path, rate, words, holdout):
    from lorafit.train.loggers import recorded
    from lorafit.train.loop import run

    job = job_for(
        tiny("llama"),
        tmp_path / "r",
        data=(str(pairs),),
        epochs=9,
        batch_size=4,
        warmup=0.0,
        scheduler="constant",
        holdout=holdout,
    )
    job.config = replace(job.config, learning_rate=rate)
    with pytest.raises(RunError, match=words) as error:
        list(recorded(job, run(job)))
    assert "a lower --learning-rate" in error.value.hint
    good = tmp_path / "r.partial" / LAST_GOOD
    if good.is_dir():
        assert str(good) in error.value.message
        digests.check(good)
        assert all(t.isfinite().all() for t in load_file(good / WEIGHTS).values())
    else:
        assert rate > 1e4  # nothing was learned yet


def test_a_full_disk_loses_nothing_that_was_saved(tiny, pairs, tmp_path, forked):
    """A limit on the size of files, as a full disk: checkpoints that no longer fit end the run."""
    code = (
        "import resource\n"
        "from lorafit.train import loop\n"
        "was = loop.save_checkpoint\n"
        "def save(folder, step, *rest):\n"
        "    if step > 4:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "    return was(folder, step, *rest)\n"
        "loop.save_checkpoint = save\n"
    )
    arguments = command(tiny, pairs, tmp_path / "r")
    done = forked.run(*arguments, first=code)
    assert done.returncode == 1 and "the disk is full" in done.stderr and "--resume" in done.stderr, (
        done.stderr
    )
    folder = RunFolder(tmp_path / "r")
    assert [p.name for p in folder.checkpoints] == ["checkpoint-4"]
    assert not list((tmp_path / "r.partial").glob(".checkpoint-*"))
    again = forked.run(*arguments, "--resume")
    assert again.returncode == 0 and "continued from step 4" in " ".join(again.stderr.split())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_memory_that_runs_out_says_what_would_fit(tiny, pairs, tmp_path, run, monkeypatch):
    from lorafit.forward.head import Forward

    def out(self, model, batch):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory: 8 bytes"
        )

    monkeypatch.setattr(Forward, "loss_sum", out)
    done = run("train", tiny("llama"), "--data", pairs, "--batch-size", 8, "-o", tmp_path / "r")
    assert done.code == 1 and "ran out of memory at micro-batches of 8 rows" in done.err
    assert "planned, instead of" in done.err and not (tmp_path / "r.partial").exists()


def test_links_in_the_output_path(tiny, pairs, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RequestError, match="exists"):
        RunFolder(tmp_path / "link").open(False, False)
    (tmp_path / "new.partial").symlink_to(tmp_path / "real")
    with pytest.raises(RequestError, match="is not a folder"):
        RunFolder(tmp_path / "new").open(True, False)
    events_of(job_for(tiny("llama"), tmp_path / "link" / "r", data=(str(pairs),), max_steps=1))
    assert (tmp_path / "real" / "r" / WEIGHTS).is_file()
    with pytest.raises(RequestError, match="lorafit did not write"):
        RunFolder(tmp_path / "link").open(True, False)
    (tmp_path / "other").symlink_to(tmp_path / "real" / "r")
    before = (tmp_path / "real" / "r" / WEIGHTS).read_bytes()
    events_of(job_for(tiny("llama"), tmp_path / "other", data=(str(pairs),), max_steps=2, overwrite=True))
    assert not (tmp_path / "other").is_symlink()  # what it led to stays as it was
    assert (tmp_path / "real" / "r" / WEIGHTS).read_bytes() == before
