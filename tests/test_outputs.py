"""Nothing is replaced that lorafit did not write, or that a command reads."""

import json
import shutil
from pathlib import Path

import pytest

from lorafit import digests
from lorafit.errors import RequestError, RunError
from lorafit.model import called
from lorafit.outputs import EDITABLE, check_file, check_target, put_in_place, work_folder
from lorafit.train.run_folder import LAST_GOOD, RunFolder


def ours(folder: Path) -> Path:
    """A folder as a finished run leaves it."""
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "checkpoint-3" / "state.json").write_text("{}")
    digests.seal(folder / "checkpoint-3")
    (folder / "templates").mkdir()
    for name in ("adapter_config.json", "templates/tool.jinja", *EDITABLE):
        (folder / name).write_text("{}")
    digests.seal(folder, but=EDITABLE)
    return folder


def test_what_lorafit_wrote_may_be_replaced(tmp_path):
    run = ours(tmp_path / "run")
    (run / "README.md").write_text("my own words")
    check_target(run, overwrite=True)
    check_target(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=True)
    with pytest.raises(RequestError, match="exists"):
        check_target(run, overwrite=False)


@pytest.mark.parametrize(
    "name", ["notes.txt", "checkpoint-3/notes.txt", "templates/notes.txt", "mine/notes.txt"]
)
def test_a_file_of_somebody_else_is_never_replaced(tmp_path, name):
    run = ours(tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    with pytest.raises(RequestError, match="did not write"):
        check_target(run, overwrite=True)


def test_what_has_changed_since_is_not_replaced(tmp_path):
    run = ours(tmp_path / "run")
    (run / "adapter_config.json").write_text('{"r": 1}')
    with pytest.raises(RequestError, match="changed since"):
        check_target(run, overwrite=True)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "README.md", "run.yaml"])
def test_a_folder_without_digests_is_not_ours_whatever_it_holds(tmp_path, name):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_text("{}")
    with pytest.raises(RequestError, match="did not write"):
        check_target(tmp_path / "m", overwrite=True)


def test_what_is_read_is_not_replaced_nor_what_holds_it_nor_what_lies_in_it(tmp_path, monkeypatch):
    run = ours(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    for target in (run, tmp_path / "link"):
        with pytest.raises(RequestError, match="is read by this command"):
            check_target(target, overwrite=True, reads=(run,))
        with pytest.raises(RequestError, match="which this command reads"):
            check_target(target, overwrite=True, reads=(run / "data.jsonl",))
        with pytest.raises(RequestError, match="lies in"):
            check_target(target, overwrite=True, reads=(tmp_path,))
    monkeypatch.chdir(run / "templates")
    with pytest.raises(RequestError, match="working directory"):
        check_target(run, overwrite=True)


def test_names_that_name_no_folder(tmp_path):
    for name in (".", "/", "a/.."):
        with pytest.raises(RequestError):
            check_target(Path(name), overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        check_target(tmp_path / "file", overwrite=True)


def test_a_folder_beside_the_target_with_a_likely_name_stays(tmp_path):
    target = ours(tmp_path / "run")
    mine = [tmp_path / f"run.{word}" for word in ("old", "merging", "unverified")]
    for folder in mine:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    put_in_place(work_folder(target, "merging"), target)
    assert all((folder / "notes.txt").read_text() == "mine" for folder in mine)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.merging", "run.old", "run.unverified"]


def test_a_folder_is_called_as_a_person_calls_it(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--ada--lora" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    assert called(snapshot) == "ada/lora" and called(snapshot.parents[1]) == "models--ada--lora"
    monkeypatch.chdir(tmp_path)
    assert called(".") == tmp_path.name and called("runs/x/") == "x" == called("~/x")


def test_what_a_killed_process_left_is_swept(tmp_path):
    left = tmp_path / ".m.merging-999999999"
    left.mkdir()
    work = work_folder(tmp_path / "m", "merging")
    assert not left.exists() and work.is_dir()


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_a_working_folder_that_is_somebody_elses_is_left_alone(tmp_path, flags):
    mine = tmp_path / "x.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    folder = RunFolder(tmp_path / "x")
    with pytest.raises(RequestError, match=r"thesis.tex`, which is not part of a run"):
        folder.open(*flags)
    folder.abandon()
    assert (mine / "thesis.tex").read_text() == "mine"


def test_a_page_replaces_only_a_page(tmp_path):
    page = tmp_path / "report.html"
    check_file(page, "--report", "<mark>")
    page.write_text("<!doctype html><mark>")
    check_file(page, "--report", "<mark>")
    page.write_text('{"text": "a row of mine"}')
    with pytest.raises(RequestError, match="did not write"):
        check_file(page, "--report", "<mark>")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_no_command_replaces_what_it_reads(tiny, pairs, tmp_path, run):
    """The model, what holds it, a foreign model, the data's folder: all stay, byte for byte."""
    home = tmp_path / "home"
    model = home / "models" / "base"
    shutil.copytree(tiny("llama"), model)
    shutil.copytree(tiny("llama"), home / "other")
    (home / "data").mkdir()
    data = Path(shutil.copy(pairs, home / "data" / "pairs.jsonl"))
    adapter = home / "runs" / "a"
    train = ("train", model, "--preset", "basic", "--data", data, "--max-steps", 1)
    assert run(*train, "-o", adapter).code == 0
    before = everything(home)
    for target in (model, home / "models", home, home / "other", home / "data"):
        for command in (train, ("merge", adapter, "--no-verify")):
            done = run(*command, "-o", target, "--overwrite")
            assert done.code == 2 and "not replaced" in done.err, (command[0], target, done.err)
    assert run("merge", adapter, "-o", adapter, "--overwrite").code == 2
    assert run("train", model, "--data", home / "data", "-o", adapter, "--overwrite").code == 0  # its own
    after = everything(home)
    assert {n: b for n, b in after.items() if not n.startswith("runs/")} == {
        n: b for n, b in before.items() if not n.startswith("runs/")
    }
    assert run("eval", adapter, "--data", data, "--samples", 0, "--report", data).code == 2
    assert data.read_bytes() == before["data/pairs.jsonl"]


def test_a_merged_model_may_be_made_again(tiny, pairs, tmp_path, run):
    assert run("train", tiny("llama"), "--data", pairs, "--max-steps", 1, "-o", tmp_path / "r").code == 0
    merge = ("merge", tmp_path / "r", "-o", tmp_path / "m", "--no-verify", "--overwrite")
    assert run(*merge).code == 0
    assert run(*merge).code == 0
    assert "model.safetensors" in json.loads((tmp_path / "m" / "digests.json").read_text())
    (tmp_path / "m" / "mine.txt").write_text("mine")
    assert run(*merge).code == 2


@pytest.mark.parametrize(
    "keep, left", [(1, [8]), (2, [6, 8]), (3, [4, 6, 8]), (4, [2, 4, 6, 8]), (9, [2, 4, 6, 8])]
)
def test_as_many_checkpoints_stay_as_keep_says(tiny, pairs, tmp_path, run, keep, left):
    train = ("train", tiny("llama"), "--data", pairs, "--max-steps", 9, "--epochs", 9, "--save-steps", 2)
    assert run(*train, "--keep", keep, "-o", tmp_path / "r").code == 0
    assert sorted(int(p.name[11:]) for p in (tmp_path / "r").glob("checkpoint-*")) == left


def unfinished(folder: Path) -> RunFolder:
    """A run that was killed after it had kept a good adapter."""
    run = RunFolder(folder)
    run.open(overwrite=False, resume=False)
    (run.work / "run.yaml").write_text("model: demo\n")
    (run.work / LAST_GOOD).mkdir()
    (run.work / LAST_GOOD / "adapter_model.safetensors").write_bytes(b"a")
    run.release()
    return run


def test_what_a_run_goes_on_from_is_not_overwritten(tmp_path):
    """The adapter that an unfinished run has left in the folder that the next run wants."""
    run = unfinished(tmp_path / "x")
    before = everything(tmp_path)
    for place in (run.work / LAST_GOOD, run.work):
        with pytest.raises(RequestError, match=r"which this command reads|is read by this command"):
            RunFolder(tmp_path / "x").open(overwrite=True, resume=False, reads=(place,))
    assert everything(tmp_path) == before
    again = RunFolder(tmp_path / "x")
    again.open(overwrite=True, resume=False, reads=(tmp_path / "other",))
    assert not (run.work / LAST_GOOD).exists()
    again.abandon()


def test_what_appears_in_its_place_while_a_run_goes_is_not_replaced(tmp_path):
    run = RunFolder(tmp_path / "x")
    run.open(overwrite=True, resume=False)
    (run.work / "adapter_config.json").write_text("{}")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"appeared during the run.*the finished run is in") as refused:
        run.finish(0, None)
    assert (tmp_path / "x" / "thesis.tex").read_text() == "mine"
    digests.check(run.work)
    assert refused.value.hint == f"mv {run.work} {tmp_path / 'x-2'}"


def test_what_stood_there_when_a_run_began_is_replaced(tmp_path):
    ours(tmp_path / "x")
    run = RunFolder(tmp_path / "x")
    run.open(overwrite=True, resume=False)
    (run.work / "adapter_config.json").write_text('{"r": 2}')
    run.finish(0, None)
    assert (tmp_path / "x" / "adapter_config.json").read_text() == '{"r": 2}' and not run.work.exists()
