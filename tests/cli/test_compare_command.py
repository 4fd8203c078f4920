import csv
import json
import re
from importlib import import_module
from io import StringIO

import pytest

from lorafit.errors import RunError


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(
        "base: {batch_size: 8, holdout: 0.2, epochs: 2}\n"
        "candidates:\n- {name: small, preset: basic, layers: last:1}\n- {name: large, preset: all, layers: all, rank: 4}\n"
    )
    return path


def test_the_answer_comes_first_then_the_table_and_the_files(tiny, pairs, tmp_path, run, grid):
    out = tmp_path / "c"
    shown = run("compare", tiny("llama"), "--data", pairs, "--grid", grid, "-o", out)
    assert shown.code == 0, shown.err
    first = shown.out.splitlines()[0]
    assert re.match(r"(Take )?`(small|large)`.* held-out loss \d", first)
    assert "compares   2 candidates, 8 steps of 8 rows each" in shown.err and "predicted" in shown.err
    assert re.search(r"1/2 +small +held-out loss", shown.err)
    stored = json.loads((out / "compare.json").read_text())
    assert stored["environment"]["lorafit"] and "To reproduce" in (out / "compare.html").read_text()
    assert [row["choice"] for row in stored["choices"]] and stored["words"][0] in " ".join(shown.out.split())
    assert stored["take"] in stored["command"] or "--preset" in stored["command"]
    lines = list(csv.DictReader(StringIO((out / "compare.csv").read_text())))
    assert [row["choice"] for row in lines] == [row["choice"] for row in stored["choices"]]
    assert float(lines[0]["loss"]) == stored["choices"][0]["loss"] and lines[0]["verdict"] == "lowest"
    page = (out / "compare.html").read_text()
    assert "small" in page and "<script" not in page and not re.search(r"(src|href)=.http", page)
    for name in ("small", "large"):
        assert (out / name / "run.yaml").is_file()


def test_a_comparison_without_a_result_is_a_failure(tiny, pairs, tmp_path, run, monkeypatch):
    def fails(job):
        raise RunError("the loss is not a number")
        yield

    monkeypatch.setattr(import_module("lorafit.compare.run"), "run", fails)
    words = ("--presets", "ffn", "--layers", "high", "--max-steps", 4, "--max-length", 64, "--workers", 1)
    for more, shown in (("--json",), "the loss is not a number"), ((), "No candidate finished."):
        done = run("compare", tiny("llama"), "--data", pairs, *words, *more, "-o", tmp_path / str(len(more)))
        assert done.code == 1 and shown in done.out, done.err


def test_the_same_command_with_resume_has_nothing_left_to_do(tiny, pairs, tmp_path, run, grid):
    out = tmp_path / "c"
    command = ["compare", tiny("llama"), "--data", pairs, "--grid", grid, "-o", out]
    first = run(*command, "--json").document
    again = run("compare", "--resume", out, "--json")
    assert again.document == first and "1/2" not in again.err
    assert run(*command, "--resume", "--json").document == first
    other = run(*command, "--resume", "--seeds", 2)
    assert other.code == 2 and "was asked for with another --seeds" in other.err
    new = run(*command)
    assert new.code == 2 and f"lorafit compare --resume {out}" in new.err


def test_data_that_changed_are_not_gone_on_with(tiny, pairs, tmp_path, run, grid):
    data = tmp_path / "d.jsonl"
    data.write_text(pairs.read_text())
    out = tmp_path / "c"
    assert run("compare", tiny("llama"), "--data", data, "--grid", grid, "-o", out, "-q").code == 0
    data.write_text("".join(pairs.read_text().splitlines(keepends=True)[:-1]))
    again = run("compare", "--resume", out)
    assert again.code == 2 and "the data has changed" in again.err


def test_texts_that_should_not_change_are_measured(tiny, pairs, tmp_path, run, grid):
    (tmp_path / "general.txt").write_text("The bridge is old.\n\nA key lies in the harbour.\n\nIt rains.\n")
    out = tmp_path / "c"
    shown = run(
        "compare",
        tiny("llama"),
        "--data",
        pairs,
        "--grid",
        grid,
        "-o",
        out,
        "--also",
        tmp_path / "general.txt",
        "--json",
    )
    for row in shown.document["choices"]:
        (also,) = row["also"]
        assert also["file"] == "general.txt" and also["delta"] and also["stderr"] >= 0
    assert "forgetting general.txt" in (out / "compare.csv").read_text()
    alone = run("eval", out / "large", "--data", tmp_path / "general.txt", "--json", "--samples", 0).document
    (large,) = (row for row in shown.document["choices"] if row["choice"] == "large")
    assert large["also"][0]["delta"] == pytest.approx(alone["adapters"][0]["delta"], abs=1e-5)


def test_what_is_impossible_is_named_before_anything_is_loaded(tiny, pairs, tmp_path, run):
    shown = run(
        "compare", tiny("llama"), "--data", pairs, "--presets", "basic", "--layers", "last:1,last:50", "--plan", "--json",
        "-o", tmp_path / "c",
    )  # fmt: skip
    assert shown.code == 0 and "left out   basic-last50" in shown.err
    assert [one["name"] for one in shown.document["candidates"]] == ["basic-last1"]
    assert not (tmp_path / "c").exists()
    none = run("compare", tiny("llama"), "--data", pairs, "--presets", "basic", "--layers", "last:50")
    assert none.code == 2 and "none of the candidates is possible" in none.err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--budget", "10"], "--budget is `10`"),
        (["--trainable", "x"], "--trainable is `x`"),
        (["--seeds", "x"], "--seeds is `x`"),
        (["--presets", "fnn"], "did you mean `ffn`"),
        (["--layers", "hihg"], "did you mean `high`"),
        (["--learning-rates", "ax"], "learning rate `ax`"),
        (["--grid", "nowhere.yaml"], "cannot read grid file"),
        (["--resume"], "--resume needs"),
        (["--rank", "8"], "--ranks"),
        (["--holdout", "0"], "--holdout 0 holds out none"),
    ],
)
def test_what_is_wrong_is_said_with_the_value(run, words, says):
    shown = run("compare", *words)
    assert shown.code == 2 and says in shown.err


def test_a_budget_becomes_steps_that_fit(run):
    command = ["compare", "--presets", "basic", "--layers", "high", "--seeds", 2, "--plan"]
    whole = run(*command, "--json").document
    budget = 0.6 * whole["seconds"]
    cut = run(*command, "--json", "--budget", f"{budget:.3f}s").document
    (most,), (steps,) = ({one["steps"] for one in found["candidates"]} for found in (whole, cut))
    assert 10 <= steps < most == 87
    (line, *_) = [line for line in run(*command).out.splitlines() if "basic-high" in line]
    assert [part for part in ("9–11", "87", "24.6k") if part not in line] == []
    few = run(*command, "--budget", "0.5s")
    assert few.code == 2 and "10 is the least" in few.err
