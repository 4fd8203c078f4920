"""What a run records to be repeated and understood: settings, versions, machine, command, date, commit of the data."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lorafit.system import git_state

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")


@pytest.fixture
def versioned(pairs, tmp_path, monkeypatch):
    """A folder with data that is committed, in it a file that is not; also the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(pairs, folder / "pairs.jsonl")
    for words in (("init", "-q"), ("add", "pairs.jsonl"), ("commit", "-q", "-m", "x")):
        subprocess.run([*GIT, *words], cwd=folder, check=True, capture_output=True)
    shutil.copy(pairs, folder / "new.jsonl")
    return folder


def test_the_state_of_a_file_in_a_repository(versioned, tmp_path):
    commit = subprocess.run(
        [*GIT, "rev-parse", "HEAD"], cwd=versioned, capture_output=True, text=True
    ).stdout.strip()
    assert git_state(versioned / "pairs.jsonl") == f"{commit}, unchanged"
    assert git_state(versioned / "new.jsonl") == f"{commit}, not in it"
    (versioned / ".gitignore").write_text("new.jsonl\n")
    assert git_state(versioned / "new.jsonl") == f"{commit}, not in it"
    with (versioned / "pairs.jsonl").open("a") as file:
        file.write("\n")
    assert git_state(versioned / "pairs.jsonl") == git_state(versioned) == f"{commit}, changed"
    assert git_state(tmp_path / "elsewhere.jsonl") == ""


def test_a_run_records_what_it_was_made_with(versioned, tiny, run, monkeypatch):
    line = ["lorafit", "train", str(tiny("llama")), "--data", f"{versioned}/pairs.jsonl=2"]
    monkeypatch.setattr("sys.argv", line)
    words = ("--data", f"{versioned}/pairs.jsonl=2", "--max-steps", 1, "--seed", 7, "--rank", 4)
    report = run("train", tiny("llama"), *words, "-o", "a", "--json").document
    chosen = {name: report["settings"][name] for name in ("preset", "layers", "rank", "seed", "max_steps")}
    assert chosen == {"preset": "basic", "layers": "all", "rank": 4, "seed": 7, "max_steps": 1}
    assert report["settings"]["model"] == str(tiny("llama")) and report["settings"]["learning_rate"] > 0
    assert report["settings"]["data"] == [f"{versioned}/pairs.jsonl=2"] and report["task"] == "causal"
    found = report["environment"]
    wanted = {"lorafit", "torch", "transformers", "peft", "python", "platform", "device", "date", "command"}
    assert wanted <= set(found) and found["commit of pairs.jsonl"].endswith(", unchanged")
    assert yaml.safe_load(Path("a/run.yaml").read_text())["environment"] == found
    page, card = Path("a/report.html").read_text(), Path("a/README.md").read_text()
    for name in ("torch", "platform", "date", "commit of pairs.jsonl"):
        assert found[name] in page and found[name] in card, name
    assert str(versioned) not in card and "lorafit train llama --data pairs.jsonl=2" in card
    again = run("train", "--resume", "a", "--json").document
    assert again["environment"] == found and again["settings"] == report["settings"]


def test_its_run_file_repeats_it(versioned, tiny, run):
    words = ("--data", versioned / "pairs.jsonl", "--max-steps", 2, "--no-sample", "-q", "--json")
    first = run("train", tiny("llama"), *words, "-o", "a").document
    again = run("train", "--config", "a/run.yaml", "-o", "b", "-q", "--json").document
    assert again["eval"] == first["eval"]


def test_env_shows_the_versions_and_the_machine(run):
    found = run("env", "--json").document
    assert {"lorafit", "torch", "peft", "python", "platform", "processor", "bitsandbytes"} <= set(found)
    assert all(f"  {name:<14}{found[name]}" in run("env").out for name in ("torch", "peft", "python"))
