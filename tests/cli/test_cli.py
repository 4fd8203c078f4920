"""The command line as a person has it: answers, errors, exit codes, manners."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = (
    "inspect",
    "data",
    "plan",
    "train",
    "eval",
    "merge",
    "export",
    "push",
    "presets",
    "cache",
    "env",
    "help",
)


def test_help_is_instant_and_imports_nothing_heavy():
    code = (
        "import sys; from lorafit.cli import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'yaml', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in ([], *([c] for c in COMMANDS)):  # about 0.2 s each on an idle machine
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_a_bare_command_shows_its_help_and_no_error(run):
    done = run()
    assert done.code == 2 and "Usage" in done.out + done.err and "error" not in done.err


def test_help_shows_defaults_of_zero_and_none_that_are_not_there(run):
    train, merge = run("train", "--help").out, run("merge", "--help").out
    decay = train[train.index("--weight-decay") :][:400]
    assert "[0.0]" in decay and "from model, preset" not in merge and "(required)" in merge


def test_what_the_prediction_lacks_is_said_before_training(run, pairs, tiny, tmp_path):
    done = run(
        "train", tiny("llama"), "--data", pairs, "--batch-size", 5000, "--max-steps", 1, "-o", tmp_path / "x"
    )
    assert done.code == 0 and "a batch of 5,000 rows is more than" in " ".join(done.err.split())


def test_version(run):
    from lorafit import __version__

    assert run("--version").out == f"lorafit {__version__}\n"


def test_inspect_answers_in_json_and_sums(run):
    found = run("inspect", "demo", "--json").document
    for key in [
        "model",
        "family",
        "stacks",
        "hidden_size",
        "intermediate_size",
        "heads",
        "kv_heads",
        "head_dim",
        "vocab_size",
        "max_positions",
        "total_params",
        "slots",
        "uncovered",
    ]:
        assert key in found
    assert [set(s) >= {"name", "path", "depth"} for s in found["stacks"]] == [True]
    assert (
        sum(s["params"] for s in found["slots"]) + sum(u["params"] for u in found["uncovered"])
        == found["total_params"]
    )
    assert set(found["slots"][0]) >= {
        "path",
        "roles",
        "part",
        "stack",
        "layer",
        "in_features",
        "out_features",
        "kind",
        "params",
    }
    assert set(found["uncovered"][0]) >= {"path", "params", "reason"}


def test_inspect_draws_the_way_of_a_text(run):
    text = run("inspect", "demo").out
    places = [text.index(w) for w in ("text → tokens", "embedding", "rotary", "block × 12", "head", "logits")]
    assert places == sorted(places)
    assert "9–11" in text and "4 heads of 32" in text and "2,525,952" in text


@pytest.mark.parametrize("width", ["40", "80", "200"])
@pytest.mark.parametrize(
    "arguments",
    [("inspect", "demo"), ("plan", "demo", "--preset", "ffn"), ("plan", "demo", "--matrix"), ("presets",)],
)
def test_nothing_is_wider_than_the_terminal(run, monkeypatch, width, arguments):
    monkeypatch.setenv("COLUMNS", width)
    lines = run(*arguments).out.splitlines()
    assert len(lines) > 10 and all(len(line.rstrip()) <= max(72, int(width)) for line in lines)


def test_plan_in_json(run):
    found = run("plan", "demo", "--preset", "ffn", "--layers", "high", "--json").document
    assert found["trainable_params"] == 69_120 and found["layers"]["indices"] == [9, 10, 11]
    memory = found["estimate"]["memory"]
    assert memory["peak"] == sum(v for k, v in memory.items() if k != "peak") > 0
    assert run("plan", "demo", "--no-estimate", "--json").document["estimate"] is None


def test_plan_plans_what_the_run_file_says(trained, run):
    output, report = trained
    found = run("plan", "--config", output / "run.yaml", "--json").document
    assert found["model"] == "llama" and found["trainable_params"] == report["trainable_params"]


def test_the_matrix_holds_every_strategy_and_band(run):
    cells = run("plan", "demo", "--matrix", "--json").document["cells"]
    assert len({(c["preset"], c["layers"]) for c in cells}) == len(cells) == 20
    text = run("plan", "demo", "--matrix").out
    assert all(word in text for word in ("basic", "attention", "extended", "ffn", "low", "mid", "high"))


def test_presets_are_listed(run):
    text = run("presets").out
    assert all(name in text for name in ("basic", "attention", "extended", "ffn", "all", "lorafit compare"))
    assert [p["name"] for p in run("presets", "--json").document["presets"]] == [
        "basic",
        "attention",
        "extended",
        "ffn",
        "all",
    ]


def test_no_colour_when_it_is_not_wanted(run, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    for arguments in (("inspect", "demo"), ("plan", "demo"), ("nonsense",)):
        result = run(*arguments)
        assert "\x1b" not in result.out + result.err


@pytest.fixture(scope="module")
def trained(tiny, pairs, tmp_path_factory):
    """A short run on a tiny model, by the command."""
    output = tmp_path_factory.mktemp("runs") / "r"
    done = lorafit(
        "train", tiny("llama"), "--data", pairs, "--max-steps", 8, "-o", output, "--json", "--batch-size", 8
    )
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def lorafit(*arguments, **more):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **more.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "lorafit", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        **more,
    )


def test_train_ends_with_one_document(trained):
    output, report = trained
    for key in [
        "output",
        "trainable_params",
        "steps",
        "tokens",
        "supervised_tokens",
        "seconds",
        "tokens_per_second",
        "epochs",
        "peak_memory_bytes",
        "eval",
        "prefix_cache",
        "predicted",
    ]:
        assert key in report
    assert report["steps"] == 8 and set(report["epochs"][0]) == {
        "epoch",
        "loss",
        "tokens",
        "seconds",
        "tokens_per_second",
        "supervised_tokens",
        "mfu",
        "replayed",
    }
    assert report["predicted"]["trainable_params"] == report["trainable_params"]
    assert report["predicted"]["peak_memory_bytes"] > 0 and report["predicted"]["seconds"] > 0
    assert (
        set(report["eval"]["before"]) == {"loss", "tokens"}
        and report["eval"]["after"]["loss"] < report["eval"]["before"]["loss"]
    )
    names = {p.name for p in output.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "run.yaml",
        "events.jsonl",
        "tokenizer.json",
    } <= names


def test_a_run_file_repeats_the_run(trained, tmp_path, run):
    output, report = trained
    again = run(
        "train", "--config", output / "run.yaml", "-o", tmp_path / "again", "--json", "--quiet"
    ).document
    assert again["eval"] == report["eval"] and [e["loss"] for e in again["epochs"]] == [
        e["loss"] for e in report["epochs"]
    ]
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        output / "adapter_model.safetensors"
    ).read_bytes()


def test_eval_on_the_runs_own_rows(trained, run):
    output, report = trained
    found = run("eval", output, "--json").document
    assert set(found) >= {"rows", "tokens", "base", "adapters", "samples"}
    assert set(found["base"]) == {"loss", "perplexity", "accuracy", "exact"}
    assert set(found["adapters"][0]) == {
        "path", "loss", "perplexity", "accuracy", "exact", "delta", "stderr", "low", "high", "best", "worst",
    }  # fmt: skip
    assert found["base"]["loss"] == pytest.approx(report["eval"]["before"]["loss"], abs=1e-5)
    assert found["adapters"][0]["loss"] == pytest.approx(report["eval"]["after"]["loss"], abs=1e-5)
    assert found["samples"][0].keys() >= {"prompt", "reference", "base", "adapters"}


def test_eval_of_several_on_other_data(trained, run, pairs):
    output, _ = trained
    found = run("eval", output, output, "--data", pairs, "--samples", "0", "--json").document
    assert found["rows"] == 40 and found["adapters"][0] == found["adapters"][1] and found["samples"] == []


def test_a_plain_adapter_needs_data(trained, run, tmp_path, pairs):
    output, _ = trained
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((output / name).read_bytes())
    result = run("eval", tmp_path)
    assert result.code == 2 and "--data" in result.err
    assert run("eval", tmp_path, "--data", pairs, "--json").document["rows"] == 40
    assert run("merge", tmp_path, "-o", tmp_path / "m", "--json").document["verify"]["argmax_agreement"] == 1


def test_merge(trained, run, tmp_path):
    output, _ = trained
    found = run("merge", output, "-o", tmp_path / "m", "--json").document
    assert (
        set(found) >= {"output", "tensors", "adapted", "bytes", "seconds", "verify"} and found["adapted"] == 8
    )
    assert set(found["verify"]) >= {"max_logit_diff", "argmax_agreement"}
    result = run("merge", output, "-o", tmp_path / "m")
    assert result.code == 2 and "--overwrite" in result.err
    text = run("merge", output, "-o", tmp_path / "m", "--overwrite")
    assert text.code == 0 and "verified" in text.out
    assert run("inspect", tmp_path / "m", "--json").document["total_params"] > 0


def test_a_run_whose_data_are_gone_still_merges(trained, run, tmp_path):
    import shutil

    import yaml

    output, _ = trained
    copy = tmp_path / "r"
    shutil.copytree(output, copy)
    settings = yaml.safe_load((copy / "run.yaml").read_text())
    (copy / "run.yaml").write_text(
        yaml.safe_dump({**settings, "data": ["gone.jsonl"], "preset": "gone.yaml"})
    )
    stored = run("eval", copy, "--samples", 0, "--json").document
    assert stored["rows"] and {**stored, "paths": [], "page": ""}["base"]
    assert run("merge", copy, "-o", tmp_path / "m").code == 0
    (copy / "held-out.safetensors").unlink()  # as in runs of earlier versions
    (copy / "digests.json").unlink()
    assert run("eval", copy).code == 2
    assert run("merge", copy, "-o", tmp_path / "n").code == 0


def test_data_that_changed_since(trained, run, tmp_path):
    import shutil

    import yaml

    output, _ = trained
    copy = tmp_path / "r"
    shutil.copytree(output, copy)
    settings = yaml.safe_load((copy / "run.yaml").read_text())
    changed = tmp_path / "changed.jsonl"
    lines = Path(settings["data"][0]).read_text().splitlines()
    changed.write_text("\n".join(lines[:20]) + "\n")
    settings["data"] = [str(changed)]
    (copy / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run("eval", copy, "--samples", 0).code == 0, "the run has its held-out rows with it"
    (copy / "held-out.safetensors").unlink()
    (copy / "digests.json").unlink()
    result = run("eval", copy)
    assert result.code == 2 and "changed since" in result.err


def test_the_demo_in_ci(tmp_path, run):
    """`--max-steps 20 --json` on the demo, as a smoke run has it; the base is named by its full path."""
    from lorafit import demo

    result = run(
        "train", "--preset", "ffn", "--layers", "high", "--max-steps", "20", "--json", "-o", tmp_path / "r"
    )
    assert result.document["trainable_params"] == 69_120 and result.document["steps"] == 20
    config = json.loads((tmp_path / "r" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(demo.MODEL) and config["layers_to_transform"] == [
        9,
        10,
        11,
    ]
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]


def test_names_of_runs(tiny, pairs, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        done = run(
            "train",
            tiny("llama"),
            "--data",
            pairs,
            "--max-steps",
            "1",
            "--layers",
            "first:2",
            "--json",
            "--quiet",
        )
        assert done.document["output"] == f"runs/llama-basic-first-2-{number}"


WRONG = [
    (("inspect", "./nowhere"), "no model at"),
    (("inspect", "nobody/nothing"), "it is not in the local cache"),
    (("plan", "demo", "--preset", "fnn"), "did you mean `ffn`"),
    (("plan", "demo", "--layers", "hihg"), "did you mean `high`"),
    (("plan", "demo", "--layers", ""), "choice of layers is empty"),
    (("plan", "demo", "--layers", "5-2"), "run backwards"),
    (("plan", "demo", "--layers", "99"), "no layer 99"),
    (("plan", "demo", "--modules", "q_porj"), "did you mean `q_proj`"),
    (("plan", "demo", "--include", "visoin"), "did you mean `vision`"),
    (("plan", "demo", "--max-length", "513"), "beyond the 512 positions"),
    (("plan", "demo", "--batch-size", "0"), "--batch-size is 0"),
    (("plan", "demo", "--dtype", "int4"), "one of auto, float32"),
    (("plan", "demo", "--rank", "0"), "--rank is 0"),
    (("plan", "demo", "--config", "none.yaml"), "cannot read run file"),
    (("train", "--learning-rate", "-1"), "--learning-rate is -1"),
    (("train", "--learning-rate", "fast"), "--learning-rate"),
    (("train", "--data", "none.jsonl"), "there is no file `none.jsonl`"),
    (("train", "--device", "cuda:99"), "no device `cuda:99`"),
    (("train", "--device", "toaster"), "--device is `toaster`"),
    (("train", "--epochs", "0"), "--epochs is 0"),
    (("train", "--max-length", "1"), "--max-length is 1"),
    (("train", "--resume"), "name it with -o"),
    (("train", "--eval-data", "none.txt"), "there is no file"),
    (("eval", "nowhere"), "no folder `nowhere`"),
    (("eval", "."), "is not an adapter"),
    (("eval",), "missing argument"),
    (("merge", "nowhere", "-o", "x"), "no folder `nowhere`"),
    (("merge", "nowhere"), "-o DIR"),
    (("nonsense",), "nonsense"),
    (("train", "--lr", "3"), "--lr"),
    (("train", "-o", "."), "is not a name for a new folder"),
    (("train", "--rank", "9999999999999"), "--rank is"),
]


@pytest.mark.parametrize("arguments, words", WRONG, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_wrong_requests_are_two_lines_and_leave_nothing(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.code == 2 and words in result.err and result.out == ""
    said = [line for line in result.err.splitlines() if line.startswith(("error:", "hint:"))]
    assert 1 <= len(said) <= 2 and said[0].startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_model_too_shallow_and_a_role_that_is_missing(run, tmp_path):
    from families import save_model

    folder = save_model("llama", tmp_path / "two", num_hidden_layers=2)
    result = run("plan", folder, "--layers", "high")
    assert result.code == 2 and "a stack of 2 layers has no band `high`" in result.err
    save_model("gpt2", tmp_path / "gpt2")
    (tmp_path / "gate.yaml").write_text("roles: [gate]\n")
    result = run("plan", tmp_path / "gpt2", "--preset", tmp_path / "gate.yaml")
    assert result.code == 2 and "plays role `gate`" in result.err and "`up`, `down`" in result.err


@pytest.mark.parametrize(
    "content, words",
    [(b"", "is empty"), (b'{"text": 3}\n{"text": 4}\n', "not a string"), (b"\xff\xfe\n", "is UTF-16")],
)
def test_data_that_is_none(run, tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(content)
    result = run("train", "--data", "bad.jsonl")
    assert result.code == 2 and words in result.err and [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_folder_that_is_taken_or_cannot_be_written(run, tmp_path):
    (tmp_path / "r").mkdir()
    assert "exists" in run("train", "-o", tmp_path / "r").err
    (tmp_path / "file").write_text("")
    result = run("train", "-o", tmp_path / "file" / "r", "--max-steps", "1")
    assert result.code == 2 and "cannot write" in result.err


def test_an_adapter_of_another_base(trained, tiny, run, pairs):
    output, _ = trained
    result = run("eval", output, "--model", tiny("gpt2"), "--data", pairs)
    assert result.code == 2 and "was not trained on" in result.err
    result = run("eval", output, "--model", "./gone", "--data", pairs)
    assert result.code == 2 and "no model at" in result.err


def test_an_adapter_whose_base_is_gone(trained, run, pairs, tmp_path):
    """`eval` and `chat` say the same, and `eval` tells adapters of two bases apart without --model."""
    output, _ = trained
    moved = tmp_path / "moved"
    shutil.copytree(output, moved, ignore=shutil.ignore_patterns("digests.json"))
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    for command in (("eval", moved), ("eval", moved, "--data", pairs), ("chat", moved)):
        result = run(*command)
        said = "".join(result.err.split())  # the lines break where the terminal ends
        assert result.code == 2 and "hint: name it with --model" in result.err
        assert "".join(f"the base of `{moved}` was not found: there is no model at".split()) in said
    result = run("eval", output, moved)
    assert result.code == 2 and "hasanotherbasethan" in "".join(result.err.split())


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_interrupted_and_resumed(tmp_path, forked, number, code):
    """Ctrl-C and SIGTERM keep what was done; the same command with --resume ends as if nothing was."""
    arguments = [
        sys.executable, "-m", "lorafit", "train", "--layers", "high", "--batch-size", "8", "--max-steps", "80",
        "-o", str(tmp_path / "r"),
    ]  # fmt: skip
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = tmp_path / "r.partial" / "events.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (events.is_file() and '"event": "step"' in events.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:  # it had ended before the signal came
        pytest.fail("the run ended before it was interrupted")
    assert process.returncode == code and "interrupted after step" in err and "--resume" in err, err
    assert not (tmp_path / "r").exists()
    command = arguments[3:]
    again = forked.run(*command, "--resume", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["steps"] == 80, again.stderr
    done = forked.run(*command, "--resume")
    assert done.returncode == 0 and "finished" in done.stderr and done.stdout == ""
    done = forked.run(*command, "--resume", "--json")
    assert json.loads(done.stdout)["steps"] == 80


def test_a_reader_that_has_had_enough():
    done = subprocess.run(
        f"{sys.executable} -m lorafit inspect demo | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.startswith("demo")


def test_debug_shows_where(tmp_path):
    done = lorafit("inspect", tmp_path / "none", "--debug")
    assert done.returncode == 2 and "error:" in done.stderr


NARROW = [
    ("presets",),
    ("inspect", "demo"),
    ("plan", "demo", "--preset", "ffn", "--layers", "high", "--no-probe"),
    ("plan", "demo", "--matrix", "--no-probe"),
    ("help",),
]


@pytest.mark.parametrize("arguments", NARROW, ids=" ".join)
def test_a_narrow_terminal_loses_no_figure_and_breaks_no_command(run, monkeypatch, arguments):
    """At 40 columns every number of the wide output is there, in lines that fit; commands stay whole."""
    monkeypatch.setenv("COLUMNS", "200")
    wide = run(*arguments).out
    monkeypatch.setenv("COLUMNS", "40")
    narrow = run(*arguments).out
    commands = [line for line in narrow.splitlines() if re.match(r"  (next|    ) {7}lorafit ", line)]
    assert all(line in wide.splitlines() for line in commands) and ("--matrix" in arguments or commands)
    assert all(len(line) <= 40 for line in narrow.splitlines() if line not in commands)
    assert all(line == line.rstrip() for line in (wide + narrow).splitlines())

    def numbers(text):
        free = re.sub(r"[\d.]+\sGB", "", text)  # free memory changes from one moment to the next
        return set(re.findall(r"\d[\d,.]*", free))

    assert numbers(narrow) == numbers(wide)


def test_a_narrow_terminal_shows_every_figure_of_a_run(tmp_path, forked):
    arguments = ["train", "--layers", "high", "--max-steps", "3", "-o", str(tmp_path / "a run")]
    narrow = {**os.environ, "COLUMNS": "40"}
    done = forked.run(*arguments, env=narrow)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stderr.split())
    assert re.search(
        r"epoch 1 loss \d\.\d{3}, \S+ tok/s, \S+ target tok/s, matmul efficiency (\d+%|–), frozen", shown
    )
    assert f"next lorafit eval '{tmp_path}/a run'" in " ".join(done.stdout.split())  # quoted, on one line
    evaluated = forked.run("eval", tmp_path / "a run", "--samples", "1", env=narrow)
    assert evaluated.returncode == 0 and re.search(r"difference [+-]\d\.\d{4} ± \d\.\d{4}", evaluated.stdout)


@pytest.mark.parametrize(
    "arguments", [("inspect", "demo"), ("help", "data"), ("plan", "--help"), ("presets",)]
)
def test_a_terminal_without_unicode(arguments):
    done = lorafit(*arguments, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "80"})
    assert done.returncode == 0 and done.stderr == "" and done.stdout.isascii() and len(done.stdout) > 500
    found = lorafit("presets", "--json", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert json.loads(found.stdout)["presets"][0]["name"] == "basic"


# skipped elsewhere: only Linux has a device that is always full, and the code under test is the same everywhere
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full: not Linux")
@pytest.mark.parametrize("arguments", ["presets", "inspect demo --json", "--version", "help data"])
def test_output_that_cannot_be_written(arguments):
    command = f"{sys.executable} -m lorafit {arguments}"
    full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True)
    assert full.returncode == 1 and full.stderr.startswith("error: cannot write the output: no space left")
    assert len(full.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", ["presets", "inspect demo --json", "--version", "help data"])
def test_output_that_is_closed(arguments):
    command = f"{sys.executable} -m lorafit {arguments}"
    closed = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True)
    assert closed.returncode == 0 and closed.stderr == ""


def test_the_shell_completes_commands_and_options():
    for typed, place, word in (("lorafit pl", 1, "plan"), ("lorafit train --lay", 2, "--layers")):
        code = "import sys; sys.argv[0] = 'lorafit'; from lorafit.cli import main; main()"
        asked = {"_LORAFIT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(place)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked}
        )
        assert done.stdout.split() == [word], done.stderr
