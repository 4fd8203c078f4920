"""Streamed layers: read block by block, run once, and never held together; the same adapter to the bit."""

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
from lorafit.events import Filling, PrefixCache
from lorafit.forward import Choice, Sweep
from lorafit.forward.prefix_store import DiskStore
from lorafit.model import find, load_model, load_streamed
from lorafit.train import frozen, loop
from lorafit.train.loggers import recorded

EXACT = [
    "llama", "qwen3", "gemma2", "phi3", "gpt_neox", "falcon", "mpt", "bloom", "mixtral", "qwen3_moe",
    "deepseek_v3", "gpt_oss", "jamba", "qwen3_next", "llava",
]  # fmt: skip


def flags(pairs, **more):
    return {
        "data": (str(pairs),), "preset": "attention", "layers": "last:2", "epochs": 2, "batch_size": 4,
        "max_length": 100, "prefix_residency": "stream", **more,
    }  # fmt: skip


def trained(model, pairs, output, **more):
    job = job_for(model, output, **flags(pairs, **more))
    return job, events_of(job)


def adapter_of(folder):
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*EXACT, "gpt2"])
def test_streamed_layers_train_the_same_adapter_to_the_bit(tiny, pairs, tmp_path, family, dtype):
    """The experts of a mixture lie one by one in its checkpoint, and in one tensor in the model."""
    model = tiny(family)
    if family == "gpt2":  # whose dropouts are active below the cut by default
        model = tmp_path / "model"
        plain = build_model(family, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        shutil.copytree(tiny(family), model)
        plain.save_pretrained(model)
    _, resident = trained(model, pairs, tmp_path / "resident", dtype=dtype, prefix_residency="resident")
    job, streamed = trained(model, pairs, tmp_path / "streamed", dtype=dtype)
    assert losses(resident) == losses(streamed)
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "resident" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    blocks = list(job.model.get_base_model().get_submodule(job.streamed.stack).children())
    cut = job.streamed.cut
    assert all(p.is_meta for block in blocks[:cut] for p in block.parameters())
    assert not any(p.is_meta for block in blocks[cut:] for p in block.parameters())
    (filled,) = [e for e in streamed if isinstance(e, Filling) and e.bytes_read]
    # all but the blocks below the cut once; these once for the first micro-batch, once for all rows
    assert filled.bytes_read == job.streamed.bytes_of(-1, 0) + 2 * job.streamed.bytes_of(0, cut)


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_model_is_the_one_that_is_loaded_whole(tiny, family, dtype):
    source = find(str(tiny(family)))
    whole = load_model(source, dtype, torch.device("cpu")).state_dict()
    stack = next(
        name
        for name, module in build_model(family).named_modules()
        if isinstance(module, torch.nn.ModuleList) and "vision" not in name
    )
    streamed = load_streamed(source, dtype, torch.device("cpu"), stack, 2)
    with streamed.held(0, 2):
        for name, tensor in streamed.model.state_dict().items():
            assert tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name]), name
    assert any(p.is_meta for p in streamed.model.parameters())


def test_an_untied_embedding_is_let_go_and_a_tied_one_kept(tiny, pairs, tmp_path):
    job, _ = trained(tiny("llama"), pairs, tmp_path / "untied")
    assert not job.found.tied_head
    assert job.model.get_base_model().get_input_embeddings().weight.is_meta
    job, _ = trained(tiny("gemma2"), pairs, tmp_path / "tied")
    assert job.found.tied_head
    assert not job.model.get_base_model().get_input_embeddings().weight.is_meta


def test_biases_that_are_trained_stay_trained(tiny, pairs, tmp_path):
    preset = tmp_path / "biases.yaml"
    preset.write_text("roles: [q, k, v]\nlora: {r: 4, bias: lora_only}\n")
    for name, residency in (("streamed", "stream"), ("resident", "resident")):
        more = {"preset": str(preset), "prefix_residency": residency, "prefix_cache": "memory"}
        trained(tiny("gpt_neox"), pairs, tmp_path / name, **more)
    found = adapter_of(tmp_path / "streamed")
    assert any("bias" in name for name in load_file(tmp_path / "streamed" / WEIGHTS))
    assert found == adapter_of(tmp_path / "resident")


@pytest.mark.parametrize("when", ["at the first state", "at once"])
def test_a_disk_without_room_leaves_a_resident_run_without_the_cache(
    tiny, pairs, tmp_path, monkeypatch, when
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(DiskStore, "put" if "state" in when else "_begin", full)
    monkeypatch.setattr(frozen, "choose", lambda *_: Choice("disk", "memory is full", 1))
    more = {"prefix_residency": "resident", "prefix_cache": "auto"}
    _, events = trained(tiny("llama"), pairs, tmp_path / "run", **more)
    (cached,) = (e for e in events if isinstance(e, PrefixCache))
    assert cached.where == "off" and "No space left" in cached.reason
    assert losses(events)


def test_states_on_disk_are_filled_in_groups_and_found_again(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(frozen, "sweep_of", lambda streamed, *_: Sweep(1, 3, streamed.held))
    job, first = trained(tiny("llama"), pairs, tmp_path / "first", prefix_cache="disk")
    reads = next(e.bytes_read for e in first if isinstance(e, Filling) and e.bytes_read)
    groups = -(-(len(job.keys) + -(-len(job.rows.held_out) // 4)) // 3)
    assert reads == job.streamed.bytes_of(-1, 0) + (1 + groups) * job.streamed.bytes_of(0, 2)
    job, again = trained(tiny("llama"), pairs, tmp_path / "again", prefix_cache="disk")
    reads = next(e.bytes_read for e in again if isinstance(e, Filling) and e.bytes_read)
    # the first micro-batch's trial, and once more as what is stored is compared
    assert reads == job.streamed.bytes_of(-1, 0) + 2 * job.streamed.bytes_of(0, 2)
    assert adapter_of(tmp_path / "first") == adapter_of(tmp_path / "again") and len(cache.kept()) == 1
    trained(tiny("llama"), pairs, tmp_path / "resident", prefix_residency="resident", prefix_cache="memory")
    assert adapter_of(tmp_path / "first") == adapter_of(tmp_path / "resident")


def test_a_fill_that_was_killed_is_gone_on_with(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(frozen, "sweep_of", lambda streamed, *_: Sweep(1, 1, streamed.held))
    events = loop.run(job_for(tiny("llama"), tmp_path / "killed", **flags(pairs, prefix_cache="disk")))
    for event in events:
        if isinstance(event, Filling) and event.done > event.tokens / 2:
            break
    events.close()
    (left,) = cache.kept()
    assert "% filled" in left.about
    trained(tiny("llama"), pairs, tmp_path / "again", prefix_cache="disk")
    trained(tiny("llama"), pairs, tmp_path / "resident", prefix_residency="resident", prefix_cache="memory")
    assert adapter_of(tmp_path / "again") == adapter_of(tmp_path / "resident")


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("gpt2", {}, "dropout"),
        ("opt", {}, "dropout"),
        ("llama", {"layers": "all"}, "layer 0"),
        ("llama", {"prefix_cache": "off"}, "has to be kept"),
        ("bert", {"preset": "attention"}, "masked"),
        ("t5", {}, "stacks"),
    ],
)
def test_what_cannot_be_streamed_is_refused_with_its_reason(tiny, pairs, tmp_path, family, more, reason):
    with pytest.raises(RequestError, match=reason) as found:
        trained(tiny(family), pairs, tmp_path / "run", **more)
    assert "prefix-residency" in found.value.message + found.value.hint


def test_a_reader_of_lower_layers_is_found_out(tiny, pairs, tmp_path, monkeypatch):
    reads_layer_0(monkeypatch)
    with pytest.raises(RunError, match="a layer above them reads them"):
        trained(tiny("llama"), pairs, tmp_path / "run")


def sharded(tiny, tmp_path):
    """A model in several files."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny("llama"), folder)
    (folder / "model.safetensors").unlink()
    build_model("llama").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_a_shard_that_is_cut_short_is_named(tiny, pairs, tmp_path):
    folder = sharded(tiny, tmp_path)
    path = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(RequestError, match=path.name):
        trained(folder, pairs, tmp_path / "run")


def test_a_shard_that_changes_while_it_is_read_ends_the_run(tiny, pairs, tmp_path):
    folder = sharded(tiny, tmp_path)
    events, path = loop.run(job_for(folder, tmp_path / "run", **flags(pairs))), folder / "none"
    with pytest.raises(RunError, match="changed while it was read"):
        for event in events:
            if isinstance(event, PrefixCache):
                path = sorted(folder.glob("*.safetensors"))[1]
                weights = load_file(path)
                save_file({name: tensor + 1 for name, tensor in weights.items()}, path, {"format": "pt"})
    assert path.exists()


def test_a_shard_that_shrinks_while_it_is_read_ends_the_run(tiny, pairs, tmp_path):
    folder = sharded(tiny, tmp_path)
    with pytest.raises(RunError, match="cannot read the weights"):
        for event in loop.run(job_for(folder, tmp_path / "run", **flags(pairs))):
            if isinstance(event, PrefixCache):
                for path in folder.glob("*.safetensors"):
                    os.truncate(path, 100)


def test_a_checkpoint_that_lacks_a_block_is_refused(tiny, pairs, tmp_path):
    folder = tmp_path / "lacking"
    shutil.copytree(tiny("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj\.weight. is not in the checkpoint"):
        trained(folder, pairs, tmp_path / "run")


def test_a_run_is_resumed_with_other_residency(tiny, pairs, tmp_path):
    trained(tiny("llama"), pairs, tmp_path / "whole", prefix_residency="resident")
    job = job_for(tiny("llama"), tmp_path / "run", **flags(pairs, save_steps=3))
    events = recorded(job, loop.run(job))
    for event in events:
        if type(event).__name__ == "Saved":
            break
    events.close()
    trained(tiny("llama"), pairs, tmp_path / "run", resume=True, prefix_residency="resident", save_steps=3)
    assert adapter_of(tmp_path / "whole") == adapter_of(tmp_path / "run")


def test_the_families_are_known():
    assert set(EXACT) <= set(FAMILIES)


def test_a_disk_that_fills_up_ends_the_run_and_what_is_cached_is_gone_on_with(
    tiny, pairs, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(frozen, "sweep_of", lambda streamed, *_: Sweep(1, 1, streamed.held))
    job = job_for(tiny("llama"), tmp_path / "full", **flags(pairs, prefix_cache="disk"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # a state fits, all of them do not
    try:
        with pytest.raises(RunError, match="could not be written") as found:
            list(loop.run(job))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "free some space" in found.value.hint
    (left,) = cache.kept()
    assert "% filled" in left.about
    job, again = trained(tiny("llama"), pairs, tmp_path / "again", prefix_cache="disk")
    reads = next(e.bytes_read for e in again if isinstance(e, Filling) and e.bytes_read)
    below, micro_batches = job.streamed.bytes_of(0, 2), len(job.keys) + -(-len(job.rows.held_out) // 4)
    assert reads < job.streamed.bytes_of(-1, 0) + (1 + micro_batches) * below
    trained(tiny("llama"), pairs, tmp_path / "resident", prefix_residency="resident", prefix_cache="memory")
    assert adapter_of(tmp_path / "again") == adapter_of(tmp_path / "resident")
