"""Mistakes people make, and what they are told: what was wrong, with the value, and what to do next."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

from lorafit.model.chart import chart_of
from lorafit.model.source import find

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
    (["merge", "a", "b", "-o", "c"], "`b`", "lorafit merge a --adapter b -o DIR"),
    (["train", "demo", "d.jsonl"], "`d.jsonl`", "--data d.jsonl"),
    (["train", "demo", "--sample", "false"], "--sample takes no value", "--no-sample"),
    (["train", "demo", "--epochs", "1", "--sample", "1"], "--sample takes no value", "write --sample alone"),
    (["train", "demo", "--overwrite", "false"], "--overwrite takes no value", "leave out --overwrite"),
    (["train", "demo", "--overwrite", "True"], "--overwrite takes no value", "write --overwrite"),
    (["train", "demo", "--overwrite", "d.jsonl"], "`d.jsonl`", "--data d.jsonl"),
    (["presets", "ffn"], "`ffn`", "lorafit presets --help"),
    (["merge", "nowhere", "-o", "c"], "`nowhere`", ""),
    (["eval", "nowhere"], "`nowhere`", ""),
    (["trian"], "trian", "train"),
    (["chat", "x", "--temperature", "hot"], "--temperature is `hot`", "a number from 0 on, at most 10"),
    (["chat", "x", "--max-new-tokens", "0"], "--max-new-tokens is `0`", "a whole number from 1 on"),
    (["data", "--row", "x"], "--row is `x`", "a whole number from 1 on"),
    (["data", "--row", "1", "--row", "x"], "--row is `x`", "a whole number from 1 on"),
    (["chat", "x", "--model"], "'--model' requires an argument", "lorafit chat --help"),
    (["merge", "x", "-o", "m", "--adapter"], "'--adapter' requires an argument", "lorafit merge --help"),
    (["train", "demo", "my data.jsonl"], "`my data.jsonl`", "--data 'my data.jsonl'"),
    (["merge", "-o", "out", "--dtype", "float32", "a", "b"], "`b`", "lorafit merge a --adapter b -o DIR"),
    (["train", "--warmup", "1.5"], "--warmup is 1.5", "--warmup 2"),
    (["inspect", "~no-such-person/model"], "`~no-such-person/model`", "name the whole path"),
    (["runs", ".", "--sort", "spee"], "no column `spee`", ""),
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
    "--max-minutes": "timeout -s INT",
}


@pytest.mark.parametrize("name, ours", KNOWN.items())
def test_names_of_other_tools_are_answered(run, name, ours):
    done = run("train", name, "1")
    assert done.code == 2 and f"there is no option `{name}`" in done.err and ours in done.err, done.err


def test_a_launcher_whose_variables_cannot_be_read_is_an_error(forked):
    done = forked.run("presets", env={**os.environ, "WORLD_SIZE": "x", "RANK": "0"})
    assert done.returncode == 2 and done.stdout == "" and "WORLD_SIZE is `x`" in done.stderr, done.stderr


def test_columns_that_are_no_number_are_not_read(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80x")
    assert run("presets").code == 0


def test_a_warm_up_longer_than_the_run_is_told(run):
    def notes(*more):
        found = run("plan", "demo", "--max-steps", 5, "--no-probe", "--json", *more).document
        return [note for note in found["estimate"]["assumptions"] if "--warmup" in note]

    (note,) = notes("--warmup", 100)
    assert note.startswith("--warmup 100 is cut to 4: the run has 5 steps")
    assert not notes("--warmup", 4) and not notes("--warmup", 0.9)


def test_a_config_without_weights_offers_no_training(run, tiny, tmp_path):
    shutil.copyfile(tiny("llama") / "config.json", tmp_path / "config.json")
    for place in (tmp_path / "config.json", tmp_path):
        assert "next" not in run("plan", place, "--no-estimate").out
    assert "lorafit train" in run("plan", tiny("llama"), "--no-estimate").out


def test_every_answer_is_an_option_of_train(run):
    """A table of names that is right on the day it is written, and later."""
    import typer

    from lorafit.cli import app
    from lorafit.operations.other_tools import LORAFITS, ours

    group = typer.main.get_command(app)
    train, plan = ({f for p in group.commands[n].params for f in p.opts} for n in ("train", "plan"))
    for theirs, found in LORAFITS.items():
        assert not found.startswith("--") or found.split()[0] in train, (theirs, found)
        assert f"--{theirs}" not in train, f"{theirs} is an option of lorafit's own"
    assert ours("--output_dir", plan) == "`lorafit train` calls it --output"
    assert ours("--nothing-known", train) == ""


# Files and folders taken for something else: (command, what the error names, what the hint offers).
TAKEN = [
    ("train x.gguf --data d.jsonl", "GGUF", "name the original model"),
    ("train gguf --data d.jsonl", "GGUF", "name the original model"),
    ("train m/model.safetensors --data d.jsonl", "weight file", "name its folder: m"),
    ("train d.jsonl --data m", "model and data are swapped", "lorafit train m --data d.jsonl"),
    ("plan d.jsonl --data m", "model and data are swapped", "lorafit train m --data d.jsonl"),
    ("train d.jsonl", "needs data", "--data"),
    ("inspect d.jsonl", "`d.jsonl` is data", "--data d.jsonl"),
    ("train m --data m", "`m` is a model, not data", ".jsonl"),
    ("train m --data a", "`a` is a run, not data", ".jsonl"),
    ("train m", "`m` needs data", "--data"),
    ("data m", "`m` needs data", "--data"),
    ("train a --data d.jsonl", "`a` is an adapter, not a model", "--from-adapter a"),
    ("train m --data d.jsonl --preset a/run.yaml", "is a run file, not a preset", "--config"),
    ("train m --data d.jsonl --preset d.jsonl", "is not a preset", "lorafit help presets"),
    ("train --config p.yaml", "is a preset, not a run file", "--preset p.yaml"),
    ("train --config d.jsonl", "is data, not a run file", "--data d.jsonl"),
    ("train --config a", "is a run's folder", "--config a/run.yaml"),
    ("train --config odd.yaml", "unknown key `wxyz`", "lorafit help options"),
    ("eval m", "is a model, not an adapter", "lorafit eval m --data FILE"),
    (
        "eval m a --data d.jsonl",
        "`m` is a model, and models are scored one by one",
        "lorafit eval m --data FILE",
    ),
    ("eval m --model bare --data d.jsonl", "--model `bare` is the base of an adapter", "leave out --model"),
    ("chat m --model bare", "--model `bare` is the base of an adapter", "leave out --model"),
    ("export m --model bare --to gguf", "--model `bare` is the base of an adapter", "leave out --model"),
    (
        "eval m --data d.jsonl --prefix-residency stream",
        "a model alone has no band",
        "--prefix-residency resident",
    ),
    ("eval m --also d.jsonl --by topic", "--by groups rows of --data", "--data"),
    ("eval a --limit 5", "--limit is for --tasks", "--tasks"),
    ("plan m --data d.jsonl --no-estimate --fit 24GB", "--fit is an estimate", "leave one"),
    ("plan m --data d.jsonl --no-estimate --matrix", "--matrix is an estimate", "leave one"),
    ("compare m --data d.jsonl --plan --csv", "--csv prints the results", "leave one"),
    ("compare m --data d.jsonl --json --csv", "--csv prints the results", "leave one"),
    ("merge m -o x", "is a model, not an adapter", "lorafit eval m --data FILE"),
    ("eval d.jsonl", "is data, not an adapter", "--data d.jsonl"),
    ("eval begun", "is an unfinished run", "lorafit train --resume begun"),
    ("eval begun.partial", "is an unfinished run", "lorafit train --resume begun"),
    ("train link --data d.jsonl", "`link` is a link whose target is missing", ""),
    ("train m --data link", "`link` is a link whose target is missing", "gone"),
    ("eval link", "`link` is a link whose target is missing", "gone"),
    ("chat link", "`link` is a link whose target is missing", "gone"),
    ("eval a --data nowhere.jsonl", "`nowhere.jsonl`", ".jsonl"),
    ("train bare --data d.jsonl", "no tokenizer", "where the model came from"),
    ("plan bare --data d.jsonl", "no tokenizer", "where the model came from"),
    ("train m --data d.jsonl --chat-template none.jinja", "`none.jinja`", "No such file"),
    (
        "train m --data d.jsonl --chat-template bad.jinja",
        "`bad.jinja:2` is not a valid template",
        "Jinja template",
    ),
    ("train m --data d.jsonl --config bad.yaml", "`bad.yaml:3`: it is not valid YAML", ""),
    ("train nobody/nothing --data d.jsonl", "HF_HUB_OFFLINE is set", "check the name"),
    ("eval nobody/nothing", "HF_HUB_OFFLINE is set", "check the name"),
    ("chat nobody/nothing", "HF_HUB_OFFLINE is set", "check the name"),
]


@pytest.fixture(scope="module")
def desk(tiny, pairs, tmp_path_factory):
    """A folder with a model, a run, data, and what is easily taken for one of them."""
    from lorafit.cli import app

    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny("llama"), folder / "m")
    shutil.copytree(tiny("llama"), folder / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    shutil.copy(pairs, folder / "d.jsonl")
    words = [
        "--data",
        str(folder / "d.jsonl"),
        "--max-steps",
        "1",
        "--no-sample",
        "-q",
        "-o",
        str(folder / "a"),
    ]
    with pytest.raises(SystemExit) as end:
        app(["train", str(folder / "m"), *words])
    assert end.value.code == 0
    (folder / "begun.partial").mkdir()
    shutil.copy(folder / "a" / "run.yaml", folder / "begun.partial")
    (folder / "gguf").mkdir()
    for name in ("x.gguf", "gguf/x.gguf"):
        (folder / name).write_bytes(b"GGUF" + bytes(64))
    (folder / "p.yaml").write_text("description: mine\nroles: [q]\nlora: {r: 4}\n")
    (folder / "odd.yaml").write_text("wxyz: red\n")
    (folder / "bad.jinja").write_text("{{ bos_token }}\n{% for")
    (folder / "bad.yaml").write_text("preset: ffn\nlayers: [\n")
    (folder / "link").symlink_to("gone")
    return folder


@pytest.mark.parametrize("command, named, offered", TAKEN, ids=[row[0] for row in TAKEN])
def test_what_is_taken_for_something_else_is_named(run, desk, monkeypatch, command, named, offered):
    monkeypatch.chdir(desk)
    before = sorted(desk.iterdir())
    done = run(*command.split())
    assert done.code == 2 and done.out == ""
    lines = done.err.strip().splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 2, done.err
    assert named in lines[0] and offered in lines[-1], done.err
    assert sorted(desk.iterdir()) == before


def test_these_are_refused_before_torch_is_loaded(desk):
    chart_of(find("demo"))  # its map is kept
    code = (
        "import json, sys\n"
        "from lorafit.cli import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        app(words)\n"
        "    except SystemExit as end:\n        assert end.code == 2, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    commands = [row[0].split() for row in TAKEN] + [row[0] for row in TYPED if row[0][0] != "plan"]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=desk, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-600:]


def test_bitsandbytes_that_is_missing_is_named(run, desk, monkeypatch):
    monkeypatch.setattr("lorafit.model.quantised.find_spec", lambda name: None)
    monkeypatch.chdir(desk)
    done = run("train", "m", "--data", "d.jsonl", "--quantize", "nf4")
    assert done.code == 2 and "needs `bitsandbytes`, which is not installed" in done.err, done.err
    assert "pip install 'lorafit[quant]'" in done.err


def test_attention_that_is_not_installed_is_named(run, desk, monkeypatch):
    monkeypatch.setattr("lorafit.settings.values.find_spec", lambda name: None)
    monkeypatch.chdir(desk)
    done = run("train", "m", "--data", "d.jsonl", "--attention", "flash_attention_2")
    assert done.code == 2 and "needs the package `flash-attn`" in done.err and "sdpa" in done.err


def test_a_hub_that_is_not_reached_is_tried_once(run, desk, monkeypatch):
    """A port that nothing listens on: without a look before, the libraries try again for half a minute."""
    from huggingface_hub import constants

    from lorafit.model.network import hub_reached

    monkeypatch.chdir(desk)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub_reached.cache_clear()
    try:
        started = time.perf_counter()
        for command in (
            ("train", "ada/nothing", "--data", "d.jsonl"),
            ("eval", "ada/nothing"),
            ("chat", "ada/nothing"),
        ):
            done = run(*command)
            assert done.code == 2 and "the Hub was not reached" in done.err, done.err
        assert time.perf_counter() - started < 5
    finally:
        hub_reached.cache_clear()
        del hub_reached.offline


def test_a_model_is_scored_alone(run, desk, monkeypatch):
    monkeypatch.chdir(desk)
    beside = run("eval", "a", "--data", "d.jsonl", "--samples", 0, "--json").document
    alone = run("eval", "m", "--data", "d.jsonl", "--samples", 0, "--json").document
    assert alone["base"] == beside["base"] and alone["adapters"] == [] and alone["rows"] == 40
    out = run("eval", "m", "--data", "d.jsonl", "--samples", 1, "--report", "page.html").out
    page = pathlib.Path("page.html")
    assert (
        "The model on these rows" in page.read_text() and "adapter" not in page.read_text().split("<body")[1]
    )
    page.unlink()
    assert "  model" in out and "base" not in out and "difference" not in out
    assert run("merge", "a", "-o", "merged", "-q").code == 0
    merged = run("eval", "merged", "--data", "d.jsonl", "--samples", 0, "--json").document["base"]["loss"]
    assert merged == pytest.approx(beside["adapters"][0]["loss"], abs=1e-4)
    shutil.rmtree("merged")
    assert run("eval", "m", "--prompt", "Ada", "--json").document["samples"][0]["base"]


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


def test_an_option_of_train_alone_is_named_so(run):
    refused = run("plan", "demo", "--eval-steps", 2)
    assert refused.code == 2 and "`--eval-steps` is an option of `lorafit train`" in refused.err


def test_a_model_that_is_not_there_is_named_before_the_data(run):
    assert "/nonexistent/model" in (err := run("train", "/nonexistent/model").err) and "needs data" not in err


def test_plan_says_rank_alpha_and_rate_and_train_how_much_of_an_epoch(run, tmp_path):
    shown = run("plan", "demo", "--preset", "ffn", "--layers", "high", "--no-probe")
    assert re.search(r"LoRA +rank 16, alpha 32, learning rate 0\.0043 \(from hidden size 128\)", shown.out)
    trained = run(
        "train",
        "--preset",
        "basic",
        "--layers",
        "high",
        "--max-steps",
        2,
        "-o",
        tmp_path / "short",
        "--no-sample",
    )
    assert "plan       0.07 epochs, 2 steps of 32 rows" in trained.err and "rank 16" in trained.err, (
        trained.err
    )


def test_a_gated_model_says_how_it_is_had(run, monkeypatch):
    gated = type("GatedRepoError", (Exception,), {})

    def refuses(*_, **__):
        raise gated("403")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuses)
    monkeypatch.setattr("lorafit.model.source.hub_reached", lambda: True)
    done = run("inspect", "ada/gated")
    assert done.code == 2 and "access to it must be granted" in done.err
    assert "accept its terms" in done.err and "hf auth login" in done.err
