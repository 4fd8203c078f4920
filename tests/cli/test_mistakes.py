"""Mistakes people make, and what they are told: what was wrong, with the value, and what to do next."""

import shutil

import pytest

# (command, what the error names, what the hint offers)
TYPED = [
    (["train", "--lr", "0.1"], "`--lr`", "--learning-rate"),
    (["train", "--output-dir", "x"], "`--output-dir`", "--output"),
    (["train", "--lora-r", "8"], "`--lora-r`", "--rank"),
    (["train", "--lerning-rate", "1"], "`--lerning-rate`", "--learning-rate"),
    (["train", "--epochs", "three"], "`three`", "whole number"),
    (["train", "--epochs", "0"], "--epochs is 0", "from 1 on"),
    (["train", "--dropout", "1.5"], "--dropout is 1.5", "up to 1"),
    (["train", "--scheduler", "linaer"], "`linaer`", "linear"),
    (["train", "--data"], "'--data'", "lorafit train --help"),
    (["train", "--preset", "fnn"], "`fnn`", "`ffn`"),
    (["train", "--layers", "hihg"], "`hihg`", "`high`"),
    (["train", "--layers", "9-3"], "`9-3`", "`3-9`"),
    (["train", "--layers", "40"], "layer 40", "0-11"),
    (["train", "--device", "gpu"], "`gpu`", "--device"),
    (["train", "--data", "nowhere.jsonl"], "`nowhere.jsonl`", "hub"),
    (["train", "--resume"], "--resume", "-o"),
    (["plan", "--fit", "24"], "`24`", "24GB"),
    (["plan", "--rank", "100000"], "rank 100,000", "--rank 128"),
    (["plan", "./nowhere"], "`./nowhere`", "folder"),
    (["merge", "a", "b", "-o", "c"], "(b)", "--adapter"),
    (["merge", "nowhere", "-o", "c"], "`nowhere`", ""),
    (["eval", "nowhere"], "`nowhere`", ""),
    (["trian"], "trian", "train"),
]


@pytest.mark.parametrize("command, named, offered", TYPED, ids=[" ".join(row[0]) for row in TYPED])
def test_a_mistake_is_named_and_the_next_step_with_it(run, tmp_path, monkeypatch, command, named, offered):
    monkeypatch.chdir(tmp_path)
    done = run(*command)
    assert done.code == 2 and done.out == ""
    lines = done.err.strip().splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 3
    assert named in done.err and offered in done.err, done.err
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_a_batch_larger_than_the_data_is_the_data(run):
    told = run("plan", "--batch-size", 1_000_000, "--no-probe", "--json").document["estimate"]
    assert told["shape"]["batch"] == 900
    assert any("1,000,000" in note and "900" in note for note in told["assumptions"])


def test_a_rank_that_some_weights_cannot_use_is_told(run, tiny):
    notes = run("plan", tiny("llama"), "--preset", "all", "--rank", 20, "--no-estimate", "--json").document[
        "notes"
    ]
    assert any("rank 20 is more than `k_proj` can use" in note for note in notes)


def test_a_band_of_two_layers_offers_the_nearest(run, tiny, tmp_path):
    import json

    shutil.copytree(tiny("llama"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    for band, nearest in (("high", "last:1"), ("low", "first:1"), ("mid", "all")):
        done = run("plan", tmp_path / "m", "--layers", band, "--no-estimate")
        assert done.code == 2 and f"--layers {nearest}" in done.err
