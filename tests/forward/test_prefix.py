"""The frozen prefix: replayed to the bit, or refused with the reason; kept whole, or not at all."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from families import FAMILIES, build_model, reads_layer_0
from jobs import events_of, job_for, losses
from safetensors.torch import load_file, save_file

from lorafit import cache
from lorafit.adapter.folder import WEIGHTS
from lorafit.errors import RequestError, RunError
from lorafit.events import EpochDone, Filling, PrefixCache, Stepped, TrainReport
from lorafit.forward import prefix_store
from lorafit.forward.placement import choose
from lorafit.train import frozen, loop

# Families in which the state at the cut is all that the layers above it need.
EXACT = [
    "llama", "qwen3", "gemma2", "phi3", "gpt_neox", "falcon", "mpt", "bloom", "mixtral", "qwen3_moe",
    "deepseek_v3", "gpt_oss", "jamba", "qwen3_next", "llava",
]  # fmt: skip
REFUSED = {
    "gpt2": "dropout",
    "opt": "dropout",
    "bert": "masked",
    "roberta": "masked",
    "distilbert": "masked",
    "modernbert": "masked",
    "t5": "stacks",
    "bart": "stacks",
}


def trained(tiny, pairs, output, family="llama", **flags):
    settings = {
        "data": (str(pairs),), "preset": "attention", "layers": "last:2", "epochs": 3, "batch_size": 4,
        "max_length": 100, "prefix_cache": "off", **flags,
    }  # fmt: skip
    job = job_for(tiny(family), output, **settings)
    return job, events_of(job)


def adapter_of(folder):
    return (folder / WEIGHTS).read_bytes()


def test_every_family_is_exact_or_refused():
    assert sorted([*EXACT, *REFUSED]) == sorted(FAMILIES)


@pytest.mark.parametrize("family", EXACT)
def test_the_replay_trains_the_same_adapter_to_the_bit(tiny, pairs, tmp_path, family):
    _, plain = trained(tiny, pairs, tmp_path / "off", family)
    _, replayed = trained(tiny, pairs, tmp_path / "memory", family, prefix_cache="memory")
    assert [e.replayed for e in plain if isinstance(e, EpochDone)] == [False] * 3
    assert [e.replayed for e in replayed if isinstance(e, EpochDone)] == [True] * 3
    assert losses(plain) == losses(replayed)
    assert adapter_of(tmp_path / "off") == adapter_of(tmp_path / "memory")


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_exact_is_refused_with_its_reason(tiny, pairs, tmp_path, family):
    _, events = trained(tiny, pairs, tmp_path / "auto", family, prefix_cache="auto", layers="last:1")
    told = next(e for e in events if isinstance(e, PrefixCache))
    assert told.where == "off" and REFUSED[family] in told.reason
    with pytest.raises(RequestError, match="would not be exact"):
        trained(tiny, pairs, tmp_path / "asked", family, prefix_cache="memory", layers="last:1")


def test_dropout_in_the_adapters_above_the_cut_is_no_hindrance(tiny, pairs, tmp_path):
    flags = {"dropout": 0.1}
    trained(tiny, pairs, tmp_path / "off", **flags)
    trained(tiny, pairs, tmp_path / "memory", prefix_cache="memory", **flags)
    assert adapter_of(tmp_path / "off") == adapter_of(tmp_path / "memory")


def test_a_reader_of_lower_layers_is_found_out(tiny, pairs, tmp_path, monkeypatch):
    """A top layer that reads what the first one left behind: the trial on real rows sees it."""
    reads_layer_0(monkeypatch)
    with pytest.raises(RequestError, match="reads the output of layers below"):
        trained(tiny, pairs, tmp_path / "asked", prefix_cache="memory")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_blocks_below_the_cut_run_once(tiny, pairs, tmp_path, checkpointing):
    """Counted inside the blocks, in forward and in backward, with checkpointing and without."""
    job = job_for(
        tiny("llama"), tmp_path / "run", data=(str(pairs),), preset="ffn", layers="2-", epochs=3,
        batch_size=4, prefix_cache="memory", gradient_checkpointing=checkpointing,
    )  # fmt: skip
    filling, forward, backward = [0] * 4, [0] * 4, [0] * 4

    def counting(number):
        def ran(_, __, output):
            forward[number] += torch.is_grad_enabled() and job.model.training
            filling[number] += number < 2 and not job.model.training

        def passed(_, __, output):
            if output.requires_grad:
                output.register_hook(lambda _: backward.__setitem__(number, backward[number] + 1))

        return ran, passed

    for number, block in enumerate(job.model.get_base_model().model.layers):
        ran, passed = counting(number)
        block.input_layernorm.register_forward_hook(ran)
        block.mlp.register_forward_hook(passed)
    held_out, told = len(job.rows.held_out), []
    for event in loop.run(job):
        if isinstance(event, PrefixCache):
            filling[:] = [0] * 4  # what ran before is the trial
        if isinstance(event, Filling) and event.done == event.tokens:
            filled = filling[:2]  # what runs later makes the samples
        told.append(event)
    each = 3 * len(job.keys)
    in_all = len(job.keys) + -(-held_out // 4)
    assert filled == [in_all - 1] * 2  # the trial's micro-batch is stored
    assert forward == [0, 0, *[each * (2 if checkpointing else 1)] * 2]
    assert backward == [0, 0, each, each]
    done = [e for e in told if isinstance(e, Filling)]
    assert done[-1].done == done[-1].tokens and done[-2].done == done[-1].tokens - 1


def test_the_disk_holds_it_for_the_next_run(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(tiny, pairs, tmp_path / "off")
    job, first = trained(tiny, pairs, tmp_path / "first", prefix_cache="disk")
    _, again = trained(tiny, pairs, tmp_path / "again", prefix_cache="auto", learning_rate=1e-3, rank=4)
    _, same = trained(tiny, pairs, tmp_path / "same", prefix_cache="auto", max_steps=3)
    assert next(e.tokens for e in first if isinstance(e, Filling)) > 0
    assert [e.replayed for e in [*first, *again] if isinstance(e, EpochDone)] == [True] * 6
    assert next(e for e in same if isinstance(e, PrefixCache)).where == "disk"  # one pass, and it is there
    assert adapter_of(tmp_path / "off") == adapter_of(tmp_path / "first")
    (kept,) = cache.kept()
    assert kept.about.endswith("layers 0–1") and kept.tokens == job.rows.look.tokens
    tokens = kept.tokens + job.rows.look.held_out_tokens
    assert (
        prefix_store.states_folder() / kept.key / "states.bin"
    ).stat().st_size <= 1.06 * 4 * 32 * tokens  # float32, hidden 32: what is padded is little


def test_a_cache_folder_that_cannot_be_written_turns_it_off_or_ends_the_run(
    tiny, pairs, tmp_path, monkeypatch
):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(frozen, "free_memory", lambda: 0)  # so that auto goes to the disk
    monkeypatch.setattr(frozen, "free_disk", lambda path: 10**12)
    _, events = trained(tiny, pairs, tmp_path / "auto", prefix_cache="auto")
    caching = next(e for e in events if isinstance(e, PrefixCache))
    assert caching.where == "off" and "its file cannot be written: Not a directory" in caching.reason
    with pytest.raises(RunError, match=r"the frozen-layer cache below .* cannot be written") as error:
        trained(tiny, pairs, tmp_path / "disk", prefix_cache="disk")
    assert "XDG_CACHE_HOME" in error.value.hint


def test_another_model_or_other_rows_have_another_cache(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(pairs.read_text().splitlines(keepends=True)[:30]))
    trained(tiny, pairs, tmp_path / "a", prefix_cache="disk")
    trained(tiny, other, tmp_path / "b", prefix_cache="disk")
    trained(tiny, pairs, tmp_path / "c", prefix_cache="disk", layers="last:1")
    trained(tiny, pairs, tmp_path / "d", "qwen3", prefix_cache="disk")
    assert len(cache.kept()) == 4


def test_other_weights_have_another_key():
    """Whatever their values in memory: the base is the one whose files have that identity."""
    model = build_model("llama")
    keys = [prefix_store.states_key(model, "model.layers", 2, ["rows"], one * 64) for one in "aba"]
    assert keys[0] != keys[1] and keys[0] == keys[2]
    with pytest.raises(ValueError):
        prefix_store.states_key(model, "model.layers", 2, ["rows"], "")


def test_a_run_on_other_weights_takes_none_of_the_stored_states(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(tiny, pairs, tmp_path / "first", prefix_cache="disk")
    other = shutil.copytree(tiny("llama"), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    _, stored = trained(lambda name: other, pairs, tmp_path / "second", prefix_cache="disk")
    _, plain = trained(lambda name: other, pairs, tmp_path / "third")
    assert losses(stored) == losses(plain) and len(cache.kept()) == 2


def test_a_flipped_bit_is_made_good_and_the_cache_removed(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(tiny, pairs, tmp_path / "first", prefix_cache="disk")
    path = prefix_store.states_folder() / cache.kept()[0].key / "states.bin"
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    trained(tiny, pairs, tmp_path / "again", prefix_cache="disk")
    assert adapter_of(tmp_path / "first") == adapter_of(tmp_path / "again")
    assert not cache.kept()


def test_a_cache_of_the_wrong_length_is_not_read(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(tiny, pairs, tmp_path / "first", prefix_cache="disk")
    path = prefix_store.states_folder() / cache.kept()[0].key / "states.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    trained(tiny, pairs, tmp_path / "again", prefix_cache="disk")
    assert path.read_bytes() == whole and len(cache.kept()) == 1


def test_a_run_that_is_cut_short_leaves_no_cache(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(tiny, pairs, tmp_path / "short", prefix_cache="disk", max_steps=2)
    assert not cache.kept() and not list(prefix_store.states_folder().iterdir())
    dead = (
        prefix_store.states_folder() / f"{'0' * 32}{cache.FILLING}999999999"
    )  # of a process that was killed
    dead.mkdir()
    (dead / "states.bin").write_bytes(b"half")
    trained(tiny, pairs, tmp_path / "next", prefix_cache="disk")
    assert not dead.exists() and len(cache.kept()) == 1


@pytest.mark.parametrize("torn", [False, True])
def test_a_fill_that_was_killed_is_gone_on_with(tiny, pairs, tmp_path, monkeypatch, torn):
    """What a journal names and its digests confirm is not run again, but for the one micro-batch of the trial."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = {
        "data": (str(pairs),), "preset": "attention", "layers": "last:2", "epochs": 3, "batch_size": 4,
        "max_length": 100, "prefix_cache": "disk",
    }  # fmt: skip
    trained(tiny, pairs, tmp_path / "off")
    events = loop.run(job_for(tiny("llama"), tmp_path / "killed", **flags))
    for event in events:
        if isinstance(event, Filling) and event.done > event.tokens / 2:
            break
    events.close()
    (left,) = cache.kept()
    assert "% filled" in left.about and left.bytes
    (folder,) = prefix_store.states_folder().iterdir()
    stored = len((folder / cache.JOURNAL).read_text().splitlines()) - 1
    folder = folder.rename(
        folder.with_name(folder.name.replace("left", "999999999"))
    )  # a process that is gone
    if torn:  # in its last state and the line on it
        os.truncate(folder / "states.bin", (folder / "states.bin").stat().st_size - 8)
        with (folder / cache.JOURNAL).open("a") as file:
            file.write('{"key": "train')
    job, ran = job_for(tiny("llama"), tmp_path / "again", **flags), []
    job.model.get_base_model().model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    for event in loop.run(job):
        if isinstance(event, PrefixCache):
            ran.clear()
        if isinstance(event, Filling) and event.done == event.tokens:
            in_fill = len(ran)
    every = len(job.keys) + -(-len(job.rows.held_out) // 4)
    assert in_fill == every - stored + torn
    assert adapter_of(job.folder.work) == adapter_of(tmp_path / "off")
    (kept,) = cache.kept()
    assert "filled" not in kept.about


def test_what_was_stored_under_other_states_is_filled_again(tiny, pairs, tmp_path, monkeypatch):
    """A fill that another machine's arithmetic began: the trial's state differs, and nothing of it is used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(tiny, pairs, tmp_path / "first", prefix_cache="disk")
    (kept,) = cache.kept()
    folder = prefix_store.states_folder() / kept.key
    index = json.loads((folder / "index.json").read_text())
    raw = torch.frombuffer(bytearray((folder / "states.bin").read_bytes()), dtype=torch.float32).neg()
    (folder / "states.bin").write_bytes(raw.numpy().tobytes())
    for entry in index["entries"].values():
        piece = (folder / "states.bin").read_bytes()[entry["offset"] : entry["offset"] + entry["bytes"]]
        entry["digest"] = cache.digest(piece)
    (folder / "index.json").write_text(json.dumps(index))
    trained(tiny, pairs, tmp_path / "again", prefix_cache="disk")
    assert adapter_of(tmp_path / "first") == adapter_of(tmp_path / "again")


def test_a_disk_that_is_full_costs_time_and_nothing_else(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(tiny, pairs, tmp_path / "off")
    job = job_for(
        tiny("llama"), tmp_path / "full", data=(str(pairs),), preset="attention", layers="last:2", epochs=3,
        batch_size=4, max_length=100, prefix_cache="disk",
    )  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # a state fits, all of them do not
    try:
        events = []
        for event in loop.run(job):
            events.append(event)
            if isinstance(event, PrefixCache) and event.where == "off":
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    told = [e for e in events if isinstance(e, PrefixCache)]
    assert [e.where for e in told] == ["disk", "off"] and "could not be written" in told[1].reason
    assert load_file(job.folder.work / WEIGHTS).keys() and adapter_of(job.folder.work) == adapter_of(
        tmp_path / "off"
    )
    assert not cache.kept() and not list(prefix_store.states_folder().iterdir())


@pytest.mark.parametrize(
    ("asked", "passes", "size", "memory", "disk", "stored", "where"),
    [
        ("off", 3, 1, 100, 100, True, "off"),
        ("memory", 1, 50, 100, 0, False, "memory"),
        ("disk", 1, 50, 100, 0, False, "disk"),
        ("auto", 1, 1, 100, 10**12, False, "off"),
        ("auto", 1, 1, 100, 10**12, True, "disk"),
        ("auto", 3, 25, 100, 10**12, False, "memory"),
        ("auto", 3, 26, 100, 10**12, False, "disk"),
        ("auto", 3, 26, 100, 10**9, False, "off"),
    ],
)
def test_where_it_is_kept(asked, passes, size, memory, disk, stored, where):
    choice = choose(asked, passes, size, memory, disk, stored)
    assert choice.where == where and choice.reason


def test_caches_are_listed_and_removed(run, tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "nothing in" in run("cache").out
    trained(tiny, pairs, tmp_path / "a", prefix_cache="disk")
    trained(tiny, pairs, tmp_path / "b", prefix_cache="disk", layers="last:1")
    listed = run("cache", "--json").document["caches"]
    (one, two) = [entry for entry in listed if entry["kind"] == "prefix"]
    others = {entry["key"]: entry for entry in listed if entry["kind"] != "prefix"}
    assert {"maps", "digests"} <= set(others) and all(entry["bytes"] > 0 for entry in others.values())
    assert one["bytes"] > 0 and os.path.isdir(one["path"])
    assert one["key"][:8] in run("cache").out
    assert run("cache", "--remove", "nothing").code == 2
    assert run("cache", "--remove", one["key"][:8], "--json").document == {
        "removed": 1,
        "bytes": one["bytes"],
    }
    assert run("cache", "--remove", "maps").code == 0 and not os.path.exists(others["maps"]["path"])
    assert run("cache", "--remove", "all").code == 0
    assert run("cache", "--json").document["caches"] == [] and two["bytes"]


def test_the_report_says_what_became_of_it(tiny, pairs, tmp_path):
    _, events = trained(tiny, pairs, tmp_path / "run", prefix_cache="auto")
    report = events[-1]
    assert isinstance(report, TrainReport) and report.prefix_cache.where == "memory"
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line["event"] == "prefix")["layers"] == 2


def test_a_short_run_fills_only_what_it_will_see(tiny, pairs, tmp_path):
    _, whole = trained(tiny, pairs, tmp_path / "whole", prefix_cache="memory")
    job, short = trained(tiny, pairs, tmp_path / "short", prefix_cache="memory", max_steps=2)
    tokens = [next(e.tokens for e in events if isinstance(e, Filling)) for events in (whole, short)]
    held_out = int(job.rows.held_out.lengths.sum())
    steps = [e.tokens for e in short if isinstance(e, Stepped)]
    assert tokens[1] == sum(steps) + held_out < tokens[0] == int(job.rows.train.lengths.sum()) + held_out
