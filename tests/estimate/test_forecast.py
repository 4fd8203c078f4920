"""What `plan` says of memory and time: its terms, its fit, its matrix, its errors."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lorafit.estimate.forecast import Kept
from lorafit.events import DataReport, ReadSource, Rendered
from lorafit.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("512MB", 512 * 10**6), ("1.5k", 1500), ("800B", 800)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-3GB", "1e9", "3i", "24 G B", "24"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_the_estimate_has_its_terms(run):
    found = run("plan", "demo", "--preset", "ffn", "--layers", "high", "--json").document["estimate"]
    memory = found["memory"]
    assert set(memory) == {
        "weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "heap", "prefix_cache",
        "filling", "gathered", "peak",
    }  # fmt: skip
    assert memory["peak"] == sum(size for name, size in memory.items() if name != "peak")
    assert memory["weights"] == 4 * 2_525_952 and memory["adapter"] == memory["gradients"] == 4 * 69_120
    assert memory["optimizer"] == 12 * 69_120
    assert found["flops_per_token"]["forward"] > found["flops_per_token"]["prefix"] > 0
    assert found["tokens_per_epoch"] == 39_957 and found["epochs"] == 3
    assert 0 < found["seconds_per_epoch_replayed"] < found["seconds_per_epoch"]
    assert found["prefix_cache"]["where"] == "memory" and memory["prefix_cache"] > 0
    assert any("simulated step" in line for line in found["assumptions"])


def test_streamed_layers_take_the_bytes_and_reads_that_were_foreseen(run, tmp_path):
    """The weights below the band are not held, and every one is read twice: for the trial and for all rows."""
    given = ("demo", "--preset", "ffn", "--layers", "high", "--max-steps", "30")
    held, streamed = (
        run("plan", *given, "--prefix-residency", where, "--no-probe", "--json").document["estimate"]
        for where in ("resident", "stream")
    )
    assert held["prefix_residency"]["where"] == "resident" and held["memory"]["filling"] == 0
    # 9 of 12 layers and the embedding are let go
    assert streamed["memory"]["weights"] / held["memory"]["weights"] == pytest.approx(0.284, abs=0.01)
    assert streamed["memory"]["peak"] < held["memory"]["peak"]
    run("train", *given[1:], "--prefix-residency", "stream", "-o", tmp_path / "r", "-q")
    events = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    read = next(event["bytes_read"] for event in events if event["event"] == "filling")
    assert streamed["prefix_residency"]["bytes_read"] == pytest.approx(read, rel=0.05)
    cache = next(event for event in events if event["event"] == "prefix")
    assert cache["streamed"] and streamed["prefix_cache"]["bytes"] == pytest.approx(cache["bytes"], rel=0.05)
    assert streamed["prefix_residency"]["reads"] == 2


def test_plan_refuses_to_stream_what_train_would(run, tiny):
    stream = ("--prefix-residency", "stream", "--no-probe")
    for given, words in (
        (("demo", "--layers", "all"), "begins at layer 0"),
        (("demo", "--layers", "high", "--processes", "2"), "it runs in one process"),
        (("demo", "--layers", "high", "--quantize", "int8"), "the base is quantised"),
        ((tiny("opt"), "--preset", "basic", "--layers", "high"), "dropout of 0.1 is active"),
    ):
        refused = run("plan", *given, *stream)
        assert refused.code == 2 and words in refused.err and "--prefix-residency resident" in refused.err, (
            given
        )
    cells = run("plan", "demo", "--matrix", *stream, "--json").document["cells"]
    assert {cell["layers"] for cell in cells if "error" in cell} == {"low", "all"}


def test_what_does_not_fit_is_streamed(run):
    """`auto`: as soon as holding all layers takes more than what is free; where nothing fits, as a proposal."""
    given = ("plan", "demo", "--preset", "ffn", "--layers", "high", "--no-probe", "--device", "cpu", "--json")
    for room, where in (("1GB", "resident"), ("113MB", "stream"), ("1MB", "stream")):
        found = run(*given, "--fit", room).document["estimate"]["prefix_residency"]
        assert found["where"] == where, room
    given = (
        *given[:-1],
        "--prefix-residency",
        "resident",
        "--batch-size",
        "1",
        "--max-length",
        "64",
        "--json",
    )
    document = run(*given, "--fit", "12MB").document
    flags = [option["flags"] for option in document["fit"]["alternatives"]]
    assert "--prefix-residency stream" in flags and not document["fit"]["fits"]


def test_several_processes_share_rows_and_time_and_not_the_weights(run):
    given = ("plan", "demo", "--preset", "all", "--no-probe", "--batch-size", "32", "--prefix-cache", "off")
    one, four = (run(*given, *more, "--json").document for more in ((), ("--processes", "4")))
    alone, shared = one["estimate"], four["estimate"]
    assert (alone["processes"], shared["processes"]) == (1, 4)
    assert shared["shape"]["batch"] == 8 and shared["steps"] == alone["steps"]
    assert shared["memory"]["weights"] == alone["memory"]["weights"]
    assert shared["memory"]["activations"] == pytest.approx(alone["memory"]["activations"] / 4, rel=0.05)
    sent = 2 * 3 / 4 * alone["memory"]["adapter"] / 3e8 * alone["steps"] / alone["epochs"]
    assert shared["seconds_per_epoch"] == pytest.approx(alone["seconds_per_epoch"] / 4 + sent, rel=1e-3)
    assert shared["tokens_per_second"] == pytest.approx(4 * alone["tokens_per_second"], rel=1e-3)
    fit = run(*given, "--fit", "4x24GB", "--json").document
    assert fit["estimate"]["processes"] == 4 and fit["fit"]["free"] == 24 * 10**9
    text = run(*given, "--processes", "4").out
    assert "torchrun --nproc-per-node 4 -m lorafit train" in text and "in each of 4 processes" in text
    refused = run(*given, "--fit", "4x24GB", "--processes", "2")
    assert refused.code == 2 and "4 processes" in refused.err


def test_without_a_probe_a_stated_rate_is_assumed(run):
    found = run("plan", "demo", "--no-probe", "--json").document["estimate"]
    assert any("FLOP/s assumed" in line for line in found["assumptions"])
    flops = found["flops_per_token"]["forward"] + found["flops_per_token"]["backward"]
    assert found["seconds_per_epoch"] == pytest.approx(39_957 * flops / 1e11)


def test_a_run_that_ends_early_is_timed_as_such(run):
    common = ("plan", "demo", "--preset", "ffn", "--layers", "high", "--no-probe", "--json")
    whole, part = (run(*common, *more).document["estimate"] for more in ((), ("--max-steps", 10)))
    assert (whole["steps"], whole["epochs"], part["steps"]) == (87, 3, 10)
    assert part["seconds"] == pytest.approx(part["seconds_per_epoch"] * 10 / 29)
    assert part["prefix_cache"]["where"] == "off" and whole["seconds"] < 3 * whole["seconds_per_epoch"]


def test_data_that_are_named_are_counted(run, tiny, pairs, tmp_path):
    pairs = shutil.copy(pairs, tmp_path / "own.jsonl")
    plain = run("plan", tiny("llama"), "--no-probe", "--json").document["estimate"]
    assert plain["tokens_per_epoch"] is None and plain["seconds_per_epoch"] is None
    given = run("plan", tiny("llama"), "--data", pairs, "--no-probe", "--max-length", 100, "--json").document
    assert 500 < given["estimate"]["tokens_per_epoch"] < 4000
    with pairs.open("a") as file:
        file.write(json.dumps({"prompt": "one more", "completion": "row"}) + "\n")
    again = run("plan", tiny("llama"), "--data", pairs, "--no-probe", "--max-length", 100, "--json").document
    assert again["estimate"]["tokens_per_epoch"] != given["estimate"]["tokens_per_epoch"]


def test_what_does_not_fit_comes_with_what_does(run):
    common = ("plan", "demo", "--preset", "all", "--layers", "all", "--batch-size", 8, "--no-probe", "--json")
    roomy = run(*common, "--fit", "24GB").document
    assert roomy["fit"]["fits"] and not roomy["fit"]["alternatives"]
    tight = run(*common, "--fit", "40MB").document
    peak = tight["estimate"]["memory"]["peak"]
    assert peak > 40e6 and not tight["fit"]["fits"] and tight["fit"]["alternatives"]
    assert all(option["peak"] <= 40e6 for option in tight["fit"]["alternatives"])
    # each is what the plan itself says of these settings
    option = tight["fit"]["alternatives"][0]
    said = run("plan", "demo", "--preset", "all", "--layers", "all", "--no-probe", "--json", "--fit", "40MB",
               *(option["flags"].split() if "--batch-size" in option["flags"]
                 else ["--batch-size", "8", *option["flags"].split()]))  # fmt: skip
    layers = "high" if "--layers high" in option["flags"] else "all"
    assert said.document["layers"]["spec"] == layers
    assert said.document["estimate"]["memory"]["peak"] == pytest.approx(option["peak"], rel=0.02)
    nothing = run(*common, "--fit", "5MB").document
    assert not nothing["fit"]["alternatives"]


def test_the_matrix_has_memory_and_time(run):
    found = run("plan", "demo", "--matrix", "--no-probe", "--json").document
    cells = {(c["preset"], c["layers"]): c for c in found["cells"]}
    assert len(cells) == 20 and found["free"] > 0
    assert cells["all", "all"]["peak_memory"] > cells["all", "high"]["peak_memory"]
    assert cells["ffn", "high"]["seconds_per_epoch"] < cells["ffn", "low"]["seconds_per_epoch"]
    assert cells["ffn", "low"]["seconds_per_epoch_replayed"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fit", "24XB"], "takes a size"),
        (["--batch-size", 0], "--batch-size is 0"),
        (["--max-length", 99999], "beyond the 512 positions"),
        (["--device", "tpu"], "--device is `tpu`"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_wrong_request_is_told_so(run, arguments, words):
    result = run("plan", "demo", *arguments)
    assert result.code == 2 and words in result.err


def test_a_plan_that_was_asked_for_before_needs_no_torch(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    program = (
        "import sys; from lorafit.cli import app\n"
        "try: app(['plan', 'demo', '--no-probe', '--json'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert [a.stderr.strip().splitlines()[-1] for a in answers] == ["True", "False"]
    first, second = (json.loads(answer.stdout) for answer in answers)
    for found in (first, second):  # how much memory is free changes from one moment to the next
        del found["fit"]["free"], found["estimate"]["prefix_cache"]["reason"]
    assert first == second


def test_a_damaged_cache_is_made_again(tmp_path):
    kept = Kept(tmp_path)
    look = DataReport(
        (ReadSource("a", "text", 1),),
        1,
        2,
        3,
        4,
        5,
        "b",
        {"max": 2},
        2,
        samples=(Rendered("a:1", 2, 1, (("c", True),)),),
    )
    kept.put(look, ["facts"])
    assert kept.get(DataReport, ["facts"]) == look
    (path,) = tmp_path.glob("*.json")
    path.write_text("{half")
    assert kept.get(DataReport, ["facts"]) is None


def test_shorter_rows_that_are_offered_keep_the_batch(run, tmp_path):
    """A batch that follows from the rows would be larger with shorter ones, and not fit."""
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": "Ada lent the lamp. " * 60}) + "\n" for _ in range(64)))
    common = (
        "plan",
        "demo",
        "--data",
        path,
        "--preset",
        "all",
        "--max-length",
        256,
        "--no-probe",
        "--device",
        "cpu",
        "--json",
    )
    whole = run(*common).document["estimate"]["memory"]["peak"]
    found = run(*common, "--fit", f"{whole // 1500}kB").document["fit"]["alternatives"]
    (flags,) = (option["flags"] for option in found if "--max-length" in option["flags"])
    peak = next(option["peak"] for option in found if option["flags"] == flags)
    assert "--batch-size 8" in flags
    said = run(
        "plan", "demo", "--data", path, "--preset", "all", *flags.split(), "--no-probe", "--json"
    ).document
    assert said["estimate"]["memory"]["peak"] == pytest.approx(peak, rel=0.02)
