"""A base of the Hub whose weights are not on this machine yet, or not all of them."""

import json
import shutil
from importlib import import_module

import pytest
from hub_cache import in_hub_cache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.errors import RequestError
from lorafit.model import download_weights, find, stream_refusal
from lorafit.model.headers import shards
from lorafit.model.identity import fingerprint

TRAIN = (
    "train",
    "ada/tiny",
    "--preset",
    "ffn",
    "--layers",
    "last:2",
    "--max-steps",
    1,
    "--max-length",
    64,
    "-q",
)


@pytest.fixture
def away(tiny, hub, monkeypatch):
    """A base of the Hub of which the cache holds all but the weights; what brings them, `change`d or as they are."""
    home = in_hub_cache(tiny("llama"), hub, linked=False)
    (weights,) = home.rglob("model.safetensors")
    kept = hub.parent / "kept.safetensors"
    weights.rename(kept)
    change = {"by": 1.0}

    def snapshot_download(*_, **__):
        save_file({n: t * change["by"] for n, t in load_file(kept).items()}, weights, {"format": "pt"})
        return str(weights.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return weights, snapshot_download, change


@pytest.fixture
def loading_downloads(monkeypatch, away):
    """Where transformers would download the weights, they are brought."""
    from lorafit.model import load_model

    def load(*given, **more):
        away[1]()
        return load_model(*given, **more)

    for name in ("lorafit.evaluate.shared_base", "lorafit.model"):
        monkeypatch.setattr(import_module(name), "load_model", load)


def test_streamed_layers_are_downloaded_first(away, pairs, tmp_path, run):
    done = run(*TRAIN, "--data", pairs, "--prefix-residency", "stream", "-o", tmp_path / "r")
    assert done.code == 0, done.err
    assert (
        json.loads((tmp_path / "r" / "base.json").read_text())["fingerprint"] == fingerprint("ada/tiny") != ""
    )


def test_another_base_that_was_downloaded_is_refused(
    away, loading_downloads, pairs, tmp_path, run, monkeypatch
):
    weights, download, change = away
    download()
    assert run(*TRAIN, "--data", pairs, "-o", tmp_path / "r").code == 0
    for by, code in ((1.0, 0), (0.5, 2)):
        change["by"] = by
        for command in (
            ("eval", tmp_path / "r", "--samples", 0), ("eval", tmp_path / "r", "--prefix-residency", "stream", "--samples", 0),
            ("chat", tmp_path / "r", "--max-new-tokens", 1), ("merge", tmp_path / "r", "-o", tmp_path / f"m{by}"),
        ):  # fmt: skip
            weights.unlink()
            monkeypatch.setattr("sys.stdin", None)
            done = run(*command)
            assert done.code == code, (command, done.err)
            assert ("weights differ" in done.err) == (code == 2), done.err
    weights.unlink()
    monkeypatch.setattr(import_module("lorafit.train.job"), "load_base", lambda *_: download())
    more = (
        "train",
        "--from-adapter",
        tmp_path / "r",
        "--data",
        pairs,
        "--max-steps",
        1,
        "-o",
        tmp_path / "s",
        "-q",
    )
    done = run(*more)
    assert done.code == 2 and "weights differ" in done.err, done.err


def test_a_download_that_was_interrupted_goes_on(tiny, hub, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    home = in_hub_cache(tmp_path / "m", hub, linked=False)
    (last, *_) = sorted(home.rglob("model-*.safetensors"), reverse=True)
    last.unlink()
    assert fingerprint("ada/tiny") == "" and stream_refusal("ada/tiny") == ""

    def snapshot_download(*_, **__):
        shutil.copyfile(tmp_path / "m" / last.name, last)
        return str(last.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    download_weights(find("ada/tiny"))
    assert fingerprint("ada/tiny") == fingerprint(str(tmp_path / "m")) != ""
    monkeypatch.setattr("huggingface_hub.snapshot_download", pytest.fail)
    download_weights(find("ada/tiny"))  # what is there is not asked for again
    last.unlink()
    (tmp_path / "m" / last.name).unlink()
    with pytest.raises(RequestError, match="which is not there"):
        fingerprint(str(tmp_path / "m"))  # nothing else is coming into a folder


def test_weights_that_cannot_be_had_are_named_with_the_reason(tiny, hub, monkeypatch):
    home = in_hub_cache(tiny("llama"), hub, linked=False)
    (weights,) = home.rglob("model.safetensors")
    weights.unlink()
    source, asked = find("ada/tiny"), {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **how: asked.update(how) or str(weights.parent)
    )
    with pytest.raises(RequestError, match="are not on this machine, and HF_HUB_OFFLINE is set"):
        download_weights(source)
    assert asked["allow_patterns"] == ["config.json", "model.safetensors", "model.safetensors.index.json"]
    monkeypatch.setattr("lorafit.model.download.why_offline", lambda: "")
    with pytest.raises(RequestError, match=r"has no \.safetensors files") as error:
        download_weights(source)
    assert "--prefix-residency resident" in error.value.hint


def test_the_files_that_an_index_names_are_downloaded_and_no_others(tiny, hub, monkeypatch):
    home = in_hub_cache(tiny("llama"), hub, linked=False)
    (weights,) = home.rglob("model.safetensors")
    source, asked, raw = find("ada/tiny"), [], weights.read_bytes()
    weights.unlink()

    def snapshot_download(name, revision, allow_patterns):
        asked.append(allow_patterns)
        index = {"weight_map": {"a": "odd-2.safetensors", "b": "odd-1.safetensors"}}
        (weights.parent / "model.safetensors.index.json").write_text(json.dumps(index))
        for file in allow_patterns:
            if file.startswith("odd"):
                (weights.parent / file).write_bytes(raw)
        return str(weights.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    download_weights(source)
    assert asked[1:] == [["model.safetensors.index.json", "odd-1.safetensors", "odd-2.safetensors"]]


def test_one_whole_file_is_taken_before_an_index_as_transformers_takes_it(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    whole = fingerprint(str(folder))
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert shards(folder) == [folder / "model.safetensors"] and fingerprint(str(folder)) == whole
    save_file(
        {"a": load_file(folder / "model.safetensors")["model.norm.weight"]}, folder / index["weight_map"]["a"]
    )
    assert shards(folder) == [folder / "model.safetensors"] and fingerprint(str(folder)) == whole


def test_weights_that_are_no_safetensors_are_not_streamed_by_themselves(
    tiny, tmp_path, run, monkeypatch, pairs
):
    import torch

    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("lorafit.estimate.forecast.free_on", lambda *_: 1)  # nothing fits
    plan = ("plan", folder, "--data", pairs, "--preset", "ffn", "--layers", "last:2", "--no-probe", "--json")
    assert run(*plan).document["estimate"]["prefix_residency"]["where"] == "resident"
    done = run(*plan, "--prefix-residency", "stream")
    assert done.code == 2 and "there are no .safetensors files" in done.err
