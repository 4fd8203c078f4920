"""The base is the one it was trained on: identity by whole files, for folders, hub ids, the disk cache."""

import hashlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from hub_cache import in_hub_cache
from safetensors.torch import load_file, save_file

from lorafit import digests
from lorafit.adapter.folder import base_of, check_base, write_base
from lorafit.errors import RequestError
from lorafit.forward.prefix_store import DiskStore, states_key
from lorafit.model import identity
from lorafit.model.identity import fingerprint, sampled
from lorafit.model.source import find, split_revision


def change(folder, name, row, file="model.safetensors"):
    """One row of a tensor, other than before."""
    tensors = load_file(folder / file)
    tensors[name][row] += 1
    save_file(tensors, folder / file, {"format": "pt"})


def test_it_is_what_sha256sum_says(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    said = subprocess.run(["sha256sum", folder / "model.safetensors"], capture_output=True, text=True).stdout
    assert fingerprint(str(folder)) == said.split()[0]


def test_every_value_counts_where_samples_did_not_see_it(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    was, seen = fingerprint(str(folder)), sampled(str(folder))
    change(folder, "model.embed_tokens.weight", 77)
    assert sampled(str(folder)) == seen
    assert fingerprint(str(folder)) != was


@pytest.mark.parametrize("linked", [True, False])
def test_a_hub_id_and_a_folder_are_one(tiny, hub, linked):
    in_hub_cache(tiny("llama"), hub, linked=linked)
    assert fingerprint("ada/tiny") == fingerprint(str(tiny("llama"))) != ""
    assert fingerprint("ada/another") == ""


def test_a_blob_that_was_changed_in_place_is_read(tiny, hub):
    home = in_hub_cache(tiny("llama"), hub)
    was = fingerprint("ada/tiny")
    (blob,) = (p for p in (home / "blobs").iterdir() if p.name == was)
    raw = bytearray(blob.read_bytes())
    raw[-5] ^= 1
    blob.write_bytes(bytes(raw))
    assert fingerprint("ada/tiny") != was


def test_a_revision_of_a_name_without_an_owner(tiny, hub, tmp_path, run):
    in_hub_cache(tiny("gpt2"), hub, name="gpt2", revision="b" * 40, ref="v2", linked=False)
    for named in (["gpt2@v2"], ["gpt2", "--revision", "v2"]):
        assert run("inspect", *named[:1] if "@" in named[0] else ["gpt2@v2"], "--json").code == 0
        assert run("plan", *named, "--no-estimate", "--json").code == 0
    assert split_revision("gpt2@v2") == ("gpt2", "v2") and fingerprint("gpt2@v2") == fingerprint(
        str(tiny("gpt2"))
    )
    (tmp_path / "a").mkdir()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "base_model_name_or_path": "gpt2",
        "revision": "v2",
    }
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, tmp_path / "a" / "adapter_model.safetensors")
    assert base_of(tmp_path / "a") == "gpt2@v2"


def test_revisions_are_bases_of_their_own(tiny, hub, tmp_path, run):
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    change(other, "model.norm.weight", 0)
    in_hub_cache(tiny("llama"), hub)
    in_hub_cache(other, hub, revision="b" * 40, ref="v2")
    found = find("ada/tiny", "v2")
    assert (found.name, found.place) == ("ada/tiny", "ada/tiny@v2") == (found.name, find("ada/tiny@v2").place)
    assert fingerprint(found.place) == fingerprint(str(other)) != fingerprint("ada/tiny")
    done = run("plan", "ada/tiny", "--revision", "v3", "--no-estimate")
    assert done.code == 2 and "v3" in done.err and "HF_HUB_OFFLINE" in done.err
    done = run("plan", tiny("llama"), "--revision", "v2", "--no-estimate")
    assert done.code == 2 and "hub id" in done.err


def test_a_file_is_read_once(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    os.utime(folder / "model.safetensors", (1, 1))
    monkeypatch.setattr(digests, "SETTLED", 0)
    read = []
    real = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda path: read.append(path) or real(path))
    first = fingerprint(str(folder))
    assert fingerprint(str(folder)) == first and len(read) == 1
    os.utime(folder / "model.safetensors", (2, 2))
    assert fingerprint(str(folder)) == first and len(read) == 2


def test_shards_are_one_identity(tmp_path):
    from families import build_model

    build_model("llama").save_pretrained(tmp_path / "m", max_shard_size="60KB")
    was = fingerprint(str(tmp_path / "m"))
    (_, last) = sorted((tmp_path / "m").glob("*.safetensors"))[-2:]
    change(tmp_path / "m", next(iter(load_file(last))), 0, last.name)
    assert len(was) == 64 and fingerprint(str(tmp_path / "m")) != was


def test_pickled_weights_have_an_identity(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    raw = (tmp_path / "pytorch_model.bin").read_bytes()
    assert fingerprint(str(tmp_path)) == hashlib.sha256(raw).hexdigest()


def test_an_adapter_knows_its_base_by_whole_files(tiny, tmp_path):
    base, run = tmp_path / "m", tmp_path / "run"
    shutil.copytree(tiny("llama"), base)
    run.mkdir()
    write_base(run, "m", fingerprint(str(base)))
    assert check_base(run, str(base)) == fingerprint(str(base))
    change(base, "model.embed_tokens.weight", 77)
    with pytest.raises(RequestError, match="weights differ"):
        check_base(run, str(base))


def test_what_earlier_versions_kept_is_understood(tiny, tmp_path):
    base, run = tmp_path / "m", tmp_path / "run"
    shutil.copytree(tiny("llama"), base)
    run.mkdir()
    (run / "base.json").write_text(json.dumps({"model": "m", "fingerprint": sampled(str(base))}))
    assert check_base(run, str(base)) == sampled(str(base))
    change(base, "model.norm.weight", 0)
    with pytest.raises(RequestError, match="weights differ"):
        check_base(run, str(base))


def test_a_run_on_a_hub_id_refuses_the_base_once_it_changed(tiny, hub, tmp_path, pairs, run):
    home = in_hub_cache(tiny("llama"), hub, linked=False)
    done = run(
        "train", "ada/tiny", "--data", pairs, "--max-steps", 1, "--layers", "high", "-o", tmp_path / "r", "-q"
    )
    assert done.code == 0, done.err
    kept = json.loads((tmp_path / "r" / "base.json").read_text())
    assert kept["fingerprint"] == fingerprint(str(tiny("llama")))
    assert run("eval", tmp_path / "r", "--samples", 0, "--json").code == 0
    # the same checkpoint as a folder is the same base
    assert run("eval", tmp_path / "r", "--samples", 0, "--json", "--model", tiny("llama")).code == 0
    weights = next((home / "snapshots").rglob("model.safetensors"))
    save_file({n: t / 2 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    done = run("eval", tmp_path / "r", "--samples", 0, "--json")
    assert done.code == 2 and "weights differ" in done.err


def test_the_key_of_the_states_is_the_bases_identity():
    from families import build_model

    model = build_model("llama")
    one, two = (states_key(model, "model.layers", 2, ["rows"], weights) for weights in ("a" * 64, "b" * 64))
    assert one != two
    with pytest.raises(ValueError):
        states_key(model, "model.layers", 2, ["rows"], "")


def store(folder):
    return DiskStore(folder, frozenset(["a", "b"]), {"about": "x", "tokens": 1})


def test_stored_states_of_another_model_are_not_used(tmp_path):
    states = {key: torch.randn(1, 5, 8) for key in "ab"}
    first = store(tmp_path / "entry")
    for key, state in states.items():
        first.put(key, state)
    first.close()
    again = store(tmp_path / "entry")
    assert again.whole and again.get("a") is None  # not before a pass agreed
    again.put("a", states["a"] * (1 + 1e-7))
    assert torch.equal(again.get("b"), states["b"]) and torch.equal(again.get("a"), states["a"])
    again.close()
    other = store(tmp_path / "entry")
    other.put("a", states["a"] * 1.01)
    assert other.get("b") is None and torch.equal(other.get("a"), states["a"] * 1.01)
    other.put("b", states["b"] * 1.01)
    other.close()
    assert torch.equal(identity_of(tmp_path / "entry", states["a"] * 1.01), states["b"] * 1.01)


def identity_of(folder, fresh):
    found = store(folder)
    found.put("a", fresh)
    state = found.get("b")
    found.close()
    return state


def test_a_weight_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(identity, "file_digest", refused)
    with pytest.raises(RequestError, match="Permission denied"):
        fingerprint(str(tmp_path))
