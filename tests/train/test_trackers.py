"""Trackers: what each has of a run is read back from its own files; none of them can stop a run."""

import json
import os
import socket
import sqlite3
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from jobs import job_for

from lorafit.digests import check, not_ours
from lorafit.errors import RequestError
from lorafit.events import Evaluated, Note, Stepped, TrainReport
from lorafit.hub import KEPT_BACK
from lorafit.outputs import EDITABLE, TRACKING
from lorafit.settings.precedence import settle
from lorafit.settings.trackers import PACKAGES, TRACKERS
from lorafit.train.loggers import recorded, records
from lorafit.train.loop import run as train
from lorafit.train.trackers import WANDB_SET_UP, _wandb_is_set_up, trackers_of


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Where trackio keeps its runs: it reads its folder once."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch, shelf):
    """A working directory of the test's own, and no tracker set up."""
    for name in (*WANDB_SET_UP, "MLFLOW_TRACKING_URI", "TENSORBOARD_LOGGING_DIR", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.chdir(tmp_path)
    if "mlflow" in sys.modules:  # it keeps its database for the process
        sys.modules["mlflow"].set_tracking_uri(None)
    lookups, look_up = [], socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: lookups.append(host) or look_up(host, *a, **k)
    )
    yield
    assert {host for host in lookups if host not in ("127.0.0.1", "localhost")} == set()


@pytest.fixture
def tracked(tiny, pairs, tmp_path):
    """Train six steps with trackers, or up to `until`: the events, what was shown, what was warned of."""

    def run(*names, until=0, **flags):
        job = job_for(
            tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=6, batch_size=4, eval_steps=3,
            track=names, **flags,
        )  # fmt: skip
        events, shown, warned = [], [], []
        stream = recorded(job, train(job), [*records(job), *trackers_of(job, shown.append, warned.append)])
        for event in stream:
            events.append(event)
            if isinstance(event, Stepped) and event.step == until:
                stream.close()
        return events, shown, warned

    return run


def of_tensorboard(name="r", project="lorafit"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path("tensorboard") / project / name
    found = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0}).Reload()
    (config,) = folder.glob("*/hparams.yml")
    import yaml

    values = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    return values, yaml.safe_load(config.read_text())


def log_of(data):
    """The records of a LevelDB log after its head of seven bytes: blocks of 32 KiB, each piece with the sum of its
    bytes, its length, and whether it is a whole record (1), or the first, a middle or the last part of one."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def of_wandb():
    """The history of all offline folders in their order, which must be of one run."""
    from wandb.proto import wandb_internal_pb2 as proto

    values, config, ids, whole = {}, {}, set(), False
    files = sorted(Path("wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.parent.name)
    until = time.monotonic() + 20
    while not whole and time.monotonic() < until:  # its service writes the last records when the run is over
        last = [proto.Record.FromString(raw) for raw in log_of(files[-1].read_bytes())]
        whole = any(record.WhichOneof("record_type") == "exit" for record in last)
    for path in files:
        ids.add(path.stem)
        for raw in log_of(path.read_bytes()):
            record = proto.Record.FromString(raw)
            row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            for name, value in row.items():
                values.setdefault(name, []).append((row["_step"], value))
            config |= {i.key: json.loads(i.value_json) for i in record.config.update if i.key}
    assert len(ids) == 1
    return values, config


def of_mlflow():
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("lorafit").experiment_id])
    assert found.info.run_name == "r"
    names = found.data.metrics
    values = {n: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, n)] for n in names}
    return values, found.data.params


def of_trackio(shelf, project):
    (path,) = shelf.glob(f"{project}*.db")
    database = sqlite3.connect(path)
    values = {}
    for step, row in database.execute("select step, metrics from metrics order by step, id").fetchall():
        for name, value in json.loads(row).items():
            values.setdefault(name, []).append((step, value))
    ((config,),) = database.execute("select config from configs").fetchall()
    return values, json.loads(config)


@pytest.fixture
def read(shelf, request):
    """What a tracker has of the run: its figures with their steps, and its config."""
    return {
        "tensorboard": of_tensorboard,
        "wandb": of_wandb,
        "mlflow": of_mlflow,
        "trackio": lambda: of_trackio(shelf, "lorafit"),
    }


@pytest.fixture(autouse=True)
def empty_shelf(shelf):
    yield
    for path in shelf.glob("*.db*"):
        path.unlink()


SHOWN = {
    "tensorboard": "tensorboard --logdir tensorboard/lorafit",
    "wandb": "wandb sync wandb/offline-run-",
    "mlflow": "mlflow ui --backend-store-uri sqlite:///",
    "trackio": "trackio show --project lorafit",
}


@pytest.mark.parametrize("name", TRACKERS)
def test_what_was_logged_is_read_back(name, tracked, read, capfd):
    pytest.importorskip(PACKAGES[name][-1])
    events, shown, warned = tracked(name)
    values, config = read[name]()
    steps = [e for e in events if isinstance(e, Stepped)]
    held_out = [e for e in events if isinstance(e, Evaluated)]
    assert len(steps) == 6 and [e.step for e in held_out] == [0, 3, 6]

    def same(metric, wanted):
        assert values[metric] == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]

    same("train/loss", [(e.step, e.loss) for e in steps])
    same("train/grad_norm", [(e.step, e.grad_norm) for e in steps])
    same("train/learning_rate", [(e.step, e.learning_rate) for e in steps])
    same("train/tokens_per_second", [(e.step, e.tokens / e.seconds) for e in steps])
    same("eval/loss", [(e.step, e.loss) for e in held_out])
    assert all(value > 1e6 for _, value in values["train/peak_memory_bytes"])
    (report,) = [e for e in events if isinstance(e, TrainReport)]
    same("final/loss_after", [(6, report.eval["after"].loss)])
    same("final/trainable_params", [(6, report.trainable_params)])
    assert str(config["batch_size"]) == "4" and config["plan/layers"] == "0–3"
    assert config["plan/target_modules"] == "q_proj, v_proj" and "plan/trainable_params" in config
    assert len(shown) == 1 and shown[0].startswith(SHOWN[name]) and not warned
    assert not [e for e in events if isinstance(e, Note) and name in e.text]
    if name == "wandb":  # which would report to its makers
        assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    if name == "trackio":  # else it finishes the run again at the end of the process, with a line on stdout
        assert sys.modules["trackio"].context_vars.current_run.get() is None
    printed = capfd.readouterr()
    assert not printed.out and "WARNING" not in printed.err


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_goes_on_in_the_same_one_and_no_step_is_doubled(name, tracked, read, tmp_path):
    pytest.importorskip(PACKAGES[name][-1])
    tracked(name, until=5, save_steps=3)
    first = json.loads((tmp_path / "r.partial" / TRACKING).read_text())[name]
    assert first["id"] and first["name"] == "r"
    events, *_ = tracked(name, resume=True, track_name="another", device="cpu")
    assert [e.step for e in events if isinstance(e, Stepped)] == [4, 5, 6]
    assert not [e.text for e in events if isinstance(e, Note) and name in e.text]
    assert json.loads((tmp_path / "r" / TRACKING).read_text())[name]["id"] == first["id"]
    values, config = read[name]()
    assert config["plan/layers"] == "0–3"
    assert [step for step, _ in values["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in values["eval/loss"]] == [0, 3, 6]
    assert [step for step, _ in values["final/loss_after"]] == [6]


def test_trackers_may_change_when_a_run_is_resumed(tracked, read):
    for name in ("tensorboard", "trackio"):
        pytest.importorskip(name)
    tracked("trackio", until=5, save_steps=3)
    _, shown, _ = tracked("tensorboard", "tensorboard", resume=True)
    assert len(shown) == 1
    values, config = read["tensorboard"]()
    assert [step for step, _ in values["train/loss"]] == [4, 5, 6] and config["rank"] == 16


def test_a_new_run_of_the_same_name_has_a_folder_of_its_own(tracked, read, tmp_path):
    pytest.importorskip("tensorboard")
    tracked("tensorboard", track_project="a/../b", track_name="../x y")
    tracked("tensorboard", track_project="a/../b", track_name="../x y", overwrite=True)
    assert {p.name for p in (tmp_path / "tensorboard" / "a-..-b").iterdir()} == {"x-y", "x-y-2"}
    for name in ("x-y", "x-y-2"):
        values, _ = of_tensorboard(name, "a-..-b")
        assert [step for step, _ in values["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_the_runs_folder_stays_as_it_was_written(tracked, tmp_path):
    pytest.importorskip("tensorboard")
    tracked("tensorboard")
    folder = tmp_path / "r"
    check(folder)
    assert TRACKING in KEPT_BACK and not not_ours(folder, EDITABLE)
    (folder / TRACKING).unlink()  # as in a copy that was pushed and fetched again
    check(folder)


def test_a_tracker_that_cannot_begin_is_left_out(tracked, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    events, shown, warned = tracked("tensorboard")
    notes = [e.text for e in events if isinstance(e, Note) and "tensorboard" in e.text]
    assert len(notes) == 1 and notes[0].startswith("tensorboard failed and is left out from here on")
    assert isinstance(events[-1], TrainReport) and not shown and not warned


def test_a_server_that_is_gone_costs_the_tracker(tracked, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    events, shown, _ = tracked("mlflow")
    assert len([e for e in events if isinstance(e, Note) and "mlflow failed" in e.text]) == 1
    assert isinstance(events[-1], TrainReport) and not shown


def test_wandb_without_a_key_asks_for_none(tracked, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(
        sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: pytest.fail("asked"))
    )
    events, shown, _ = tracked("wandb")
    assert len([e for e in events if isinstance(e, Note) and "wandb failed" in e.text]) == 1
    assert isinstance(events[-1], TrainReport) and not shown


def test_a_tracker_that_fails_on_the_way_is_noted_once(tiny, pairs, tmp_path):
    for package in PACKAGES["mlflow"]:
        pytest.importorskip(package)
    job = job_for(tiny("llama"), tmp_path / "r", data=(str(pairs),), max_steps=6, track=("mlflow",))
    stream = recorded(job, train(job), [*records(job), *trackers_of(job, lambda _: None, lambda _: None)])
    events = []
    for event in stream:
        events.append(event)
        if isinstance(event, Stepped) and event.step == 2:
            with sqlite3.connect("mlflow.db") as database:
                database.execute("drop table metrics")
    assert len([e for e in events if isinstance(e, Note) and "mlflow failed" in e.text]) == 1
    assert isinstance(events[-1], TrainReport) and events[-1].steps == 6


def test_a_tracker_that_fails_at_the_end_is_warned_of(tracked, monkeypatch):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def fail(self):
        raise OSError("no room")

    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    events, _, warned = tracked("tensorboard")
    assert warned == ["tensorboard could not finish: OSError: no room"] and isinstance(
        events[-1], TrainReport
    )


def test_a_missing_package_is_refused_with_its_extra(run, monkeypatch):
    from lorafit.settings import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    refused = run("train", "--track", "wandb", "--report-to", "mlflow")
    assert refused.code == 2 and "Traceback" not in refused.err
    assert "--track wandb needs `wandb`" in refused.err and "--track mlflow needs" in refused.err
    assert "pip install 'lorafit[wandb,mlflow]'" in refused.err


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    from lorafit.settings.trackers import _installed

    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not _installed("no_such_tracker") and _installed("json")


@pytest.mark.parametrize("name", ["all", "none", "tensorboard,wandb"])
def test_what_is_not_one_tracker_is_refused(name):
    with pytest.raises(
        RequestError, match=f"--track is `{name}`: it takes one of tensorboard, wandb, mlflow"
    ):
        settle({"track": [name]})


def test_wandb_is_offline_unless_it_is_set_up(tmp_path, monkeypatch):
    assert not _wandb_is_set_up()
    for name in WANDB_SET_UP:
        with monkeypatch.context() as patch:
            patch.setenv(name, "x")
            assert _wandb_is_set_up()
    login = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(login))
    login.write_text("machine example.org login user password x\n")
    assert not _wandb_is_set_up()
    login.write_text("machine api.wandb.ai login user password x\n")
    assert _wandb_is_set_up()
