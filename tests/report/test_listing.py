import csv
import json
import shutil
from dataclasses import replace
from importlib import import_module
from io import StringIO

import pytest
from jobs import events_of, job_for

from lorafit.errors import Interrupted
from lorafit.report import RunRow
from lorafit.screen import Screen, show_runs
from lorafit.train import RunFolder


@pytest.fixture(scope="module")
def place(tiny, pairs, tmp_path_factory):
    """Two finished runs, one of them in a comparison's folder, and an unfinished one."""
    folder = tmp_path_factory.mktemp("listed")
    flags = {"data": (str(pairs),), "batch_size": 8, "epochs": 1}
    (folder / "both").mkdir()
    one = events_of(job_for(tiny("llama"), folder / "a", seed=3, **flags))[-1]
    other = events_of(
        job_for(tiny("llama"), folder / "both" / "b", preset="ffn", layers="high", rank=4, **flags)
    )[-1]
    with pytest.raises(Interrupted):
        events_of(job_for(tiny("llama"), folder / "c", stop=lambda: 2, **flags))
    return folder, one, other


def test_every_run_is_a_row_with_its_settings_and_results(place, run, tiny):
    folder, one, other = place
    rows = {row["run"]: row for row in run("runs", folder, "--json").document["runs"]}
    assert set(rows) == {str(folder / name) for name in ("a", "both/b", "c")}
    a, b, c = (rows[str(folder / name)] for name in ("a", "both/b", "c"))
    assert (a["finished"], b["finished"], c["finished"]) == (True, True, False)
    assert (a["seed"], b["preset"], b["layers"], b["rank"]) == (3, "ffn", "high", 4)
    assert a["after"] == one.eval["after"].loss and b["before"] == other.eval["before"].loss
    assert a["steps"] == one.steps and c["steps"] == 1 and c["before"] and c["after"] is None
    assert a["model"] == str(tiny("llama")) and a["data"] == "pairs.jsonl" and a["date"] and a["torch"]


def test_the_table_marks_what_is_unfinished_and_says_how_to_go_on(place, run):
    folder, _, _ = place
    shown = run("runs", folder)
    assert "  c *" in shown.out and f"folder     {folder}\n" in shown.out and "* is unfinished" in shown.out
    assert f"lorafit train --resume {folder / 'c'}" in shown.out
    (folder / "request.json").write_text("{}")  # as in the folder of a comparison
    assert f"lorafit compare --resume {folder}" in run("runs", folder).out
    (folder / "request.json").unlink()
    only = run("runs", folder / "a")
    assert str(folder / "a") in only.out and "unfinished" not in only.out


@pytest.mark.parametrize("lock", ["folder", "file"])
def test_what_a_process_writes_now_is_not_offered_to_be_resumed(place, run, tmp_path, monkeypatch, lock):
    if lock == "file":  # as on Windows
        monkeypatch.setattr(import_module("lorafit.train.run_folder"), "fcntl", None)
    folder, _, _ = place
    writer = RunFolder(folder / "c")
    writer.open(overwrite=False, resume=True)
    (tmp_path / "d").with_name("d.partial").mkdir()
    shutil.copy(folder / "c.partial" / "run.yaml", tmp_path / "d.partial")
    try:
        shown = run("runs", folder)
        assert "  c running" in shown.out
        assert "--resume" not in shown.out and "unfinished" not in shown.out
        both = run("runs", folder, tmp_path)
        assert f"lorafit train --resume {tmp_path / 'd'}" in both.out  # the one that is not running
    finally:
        writer.release()
    both = run("runs", folder, tmp_path)
    assert "running" not in both.out and "RUN is any of them" in both.out
    assert "lorafit train --resume RUN\n" in both.out
    assert "before –" not in run("runs", tmp_path).out
    writer.open(overwrite=False, resume=True)  # asking has not kept the lock
    writer.release()


def test_sixteen_runs_are_sixteen_lines_of_eighty_columns(monkeypatch, capsys):
    blank = RunRow(
        "", True, "org/SmolLM2-135M", "train.jsonl", "", "", 8, 0.0, 0, 87, 1.1989, 0.5, 9.0, 9, 16.0,
        "2026-11-27T09:48:50+00:00", "0.1", "2",
    )  # fmt: skip
    rows = [
        replace(blank, run=f"runs/compare-1/{preset}-{band}-lr{rate}", preset=preset, layers=band, learning_rate=rate)
        for preset in ("attention", "extended")
        for band in ("low", "mid", "high", "all")
        for rate in (0.001, 0.0043)
    ]  # fmt: skip
    rows[3] = replace(rows[3], date="2026-11-28", seed=1)
    shown = {}
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        show_runs(Screen(), rows)
        lines = shown[width] = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        assert sum("-lr0.00" in line and "0.500" in line for line in lines) == 16
    narrow, wide = (" ".join("\n".join(shown[width]).split()) for width in (80, 120))
    for said_once in ("model SmolLM2-135M", "data train.jsonl", "rank 8", "before 1.199"):
        assert narrow.count(said_once) == wide.count(said_once) == 1
    assert narrow.count("SmolLM2-135M") == narrow.count("1.199") == 1
    (head,) = (line for line in shown[80] if line.startswith("  run "))
    (wider,) = (line for line in shown[120] if line.startswith("  run "))
    assert head.split() == ["run", "preset", "layers", "rate", "after", "steps", "date"]
    assert wider.split() == ["run", "preset", "layers", "rate", "seed", "after", "steps", "time", "date"]
    assert "a wider terminal shows time, seed too" in narrow and "wider" not in wide
    assert " attention-low-lr0.001 " in narrow and "folder runs/compare-1" in narrow
    assert " runs/compare-1/attention-low-lr0.001 " in wide


def test_rows_are_sorted_by_any_column_with_what_is_unknown_last(place, run):
    folder, one, other = place
    rows = list(csv.DictReader(StringIO(run("runs", folder, "--csv", "--sort", "after").out)))
    losses = sorted([one.eval["after"].loss, other.eval["after"].loss])
    assert [row["after"] for row in rows] == [*map(str, losses), ""]
    back = run("runs", folder, "--json", "--sort", "-after").document["runs"]
    assert [row["after"] for row in back] == [*losses[::-1], None]
    for shown, name in (("rate", "learning_rate"), ("-time", "-seconds")):  # as the table calls them
        assert (
            run("runs", folder, "--json", "--sort", shown).out
            == run("runs", folder, "--json", "--sort", name).out
        )
    wrong = run("runs", folder, "--sort", "aftr")
    assert wrong.code == 2 and "did you mean `after`" in wrong.err


def test_where_there_are_no_runs(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("runs").code == 2
    assert "there is no folder `nowhere`" in run("runs", "nowhere").err
    (tmp_path / "runs").mkdir()
    assert "no runs" in run("runs").out
    (tmp_path / "runs" / "odd").mkdir()
    (tmp_path / "runs" / "odd" / "run.yaml").write_text("model: [")
    (tmp_path / "runs" / "odd" / "events.jsonl").write_text('{"event": "report", "eval": 3}\n')
    (row,) = run("runs", "--json").document["runs"]
    assert row["after"] is None and row["model"] == ""


def test_a_resumed_run_has_not_the_loss_of_the_base_as_its_own(place, run):
    """Resumed, it measures the base again, behind what it has measured."""
    folder, _, _ = place
    events = folder / "c.partial" / "events.jsonl"
    before = events.read_text()
    try:
        measured = next(line for line in before.splitlines() if '"evaluated"' in line)
        base, later = json.loads(measured), {**json.loads(measured), "step": 1, "loss": 1.5}
        events.write_text(before + "".join(json.dumps(line) + "\n" for line in (later, base)))
        (row,) = (row for row in run("runs", folder, "--json").document["runs"] if not row["finished"])
        assert (row["before"], row["after"]) == (base["loss"], 1.5)
        events.write_text(before + json.dumps(base) + "\n")
        (row,) = (row for row in run("runs", folder, "--json").document["runs"] if not row["finished"])
        assert (row["before"], row["after"]) == (base["loss"], None)
    finally:
        events.write_text(before)
