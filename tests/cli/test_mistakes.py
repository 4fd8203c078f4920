"""Mistakes people make, and what they are told: what was wrong, with the value, and what to do next."""

import shutil

import pytest

# (command, what the error names, what the hint offers)
TYPED = [
    (["train", "--lr", "0.1"], "`--lr`", "--learning-rate"),
    (["train", "--output-dir", "x"], "`--output-dir`", "--output"),
    (["train", "--lora-r", "8"], "`--lora-r`", "--rank"),
    (["train", "--lerning-rate", "1"], "`--lerning-rate`", "--learning-rate"),
    (["train", "--epochs", "three"], "`three`", "e.g. `3` or `0.5`"),
    (["train", "--epochs", "0"], "--epochs is 0", "above 0"),
    (["train", "--epochs", "-1"], "--epochs is -1", "above 0"),
    (["train", "--epochs", "nan"], "--epochs is nan", "above 0"),
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


# Names that people know from TRL, the transformers Trainer, PEFT, Axolotl and others.
KNOWN = {
    "--lr": "--learning-rate",
    "--learning_rate": "--learning-rate",
    "--num_train_epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--num_epochs": "--epochs",
    "--per_device_train_batch_size": "--batch-size",
    "--micro_batch_size": "--batch-size",
    "--batch": "--batch-size",
    "--gradient_accumulation_steps": "--accumulate",
    "--lora_r": "--rank",
    "-r": "--rank",
    "--lora_alpha": "--alpha",
    "--lora_dropout": "--dropout",
    "--target_modules": "--modules",
    "--lora_target_linear": "--preset all",
    "--layers_to_transform": "--layers",
    "--model_name_or_path": "MODEL",
    "--base_model": "MODEL",
    "--model": "MODEL",
    "--dataset": "--data",
    "--dataset_name": "--data",
    "--val_set_size": "--holdout",
    "--warmup_ratio": "--warmup",
    "--lr_scheduler_type": "--scheduler",
    "--max_seq_length": "--max-length",
    "--sequence_len": "--max-length",
    "--packing": "leave it out",
    "--bf16": "--dtype bfloat16",
    "--load_in_4bit": "--quantize nf4",
    "--load_in_8bit": "--quantize int8",
    "--optim": "--optimizer",
    "--report_to": "--report-to",
    "--run_name": "--track-name",
    "--output_dir": "--output",
    "--save_total_limit": "--keep",
    "--eval_strategy": "--eval-steps",
    "--resume_from_checkpoint": "--resume RUN",
    "--early_stopping_patience": "--patience",
    "--logging_steps": "leave it out",
    "--attn_implementation": "--attention",
    "--trust_remote_code": "leave it out",
    "--hub_model_id": "--push-to-hub",
    "--completion_only_loss": "--loss-on",
}


@pytest.mark.parametrize("name, ours", KNOWN.items())
def test_names_of_other_tools_are_answered(run, name, ours):
    done = run("train", name, "1")
    assert done.code == 2 and f"there is no option `{name}`" in done.err and ours in done.err, done.err


def test_every_answer_is_an_option_of_train(run):
    """A table of names that is right on the day it is written, and later."""
    import typer

    from lorafit.cli import app
    from lorafit.cli.other_tools import LORAFITS, ours

    group = typer.main.get_command(app)
    train, plan = ({f for p in group.commands[n].params for f in p.opts} for n in ("train", "plan"))
    for theirs, found in LORAFITS.items():
        assert not found.startswith("--") or found.split()[0] in train, (theirs, found)
        assert f"--{theirs}" not in train, f"{theirs} is an option of lorafit's own"
    assert ours("--output_dir", plan) == "`lorafit train` calls it --output"
    assert ours("--nothing-known", train) == ""


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
