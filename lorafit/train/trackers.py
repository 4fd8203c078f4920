"""Trackers that listen to a run: tensorboard, wandb, mlflow and trackio, through Accelerate's classes.

A tracker writes to this machine, in its usual place, unless its own environment sets it up for a server.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import RunError
from lorafit.events import Evaluated, Event, Loss, Started, Stepped, TrainReport
from lorafit.jsonio import jsonable
from lorafit.outputs import TRACKING
from lorafit.report import read_back
from lorafit.train.job import Job
from lorafit.train.loggers import Listener
from lorafit.train.measure import peak_memory
from lorafit.units import index_ranges

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

LONGEST = 500  # characters of a setting: some servers take no more

# What makes wandb go to a server, beside a login to one of its own.
WANDB_SET_UP = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE")
WANDB_SERVERS = ("api.wandb.ai", "api.forge.coreweave.com")

# mlflow reports its use to its makers, says what its database does, and waits minutes for a server that is gone.
MLFLOW = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


@dataclass(slots=True)
class TrackedRun:
    """A run as its tracker knows it, kept in the run's folder: a resumed run goes on with it.

    `id` is empty before the tracker has begun it; `place` is the folder or the database it is in; `last` is
    the step up to which each kind of event was logged.
    """

    project: str
    name: str
    id: str = ""
    place: str = ""
    last: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Opened:
    """A tracker that has begun a run, or goes on with it, and the command or the address that shows it."""

    tracker: GeneralTracker
    shown: str
    finish: Callable[[bool], None]  # told whether the run failed


class Tracker:
    """A listener that logs a run to a tracker: losses, rate, gradient norm, speed, memory; the settings and the
    plan as its config; the final figures.

    `show` is given what shows the run, `warn` what goes wrong once the run is over.
    """

    def __init__(self, job: Job, name: str, show: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self.job, self.name, self.show, self.warn = job, name, show, warn
        self.file = job.folder.work / TRACKING
        self.opened: Opened | None = None
        self.run = TrackedRun(job.config.track_project, job.config.track_name or job.folder.target.name)
        known = _tracked(self.file).get(name) if job.config.resume else None
        if known is not None:
            self.run = known
            for kind, step in _logged(job.folder.work).items():
                known.last[kind] = max(step, known.last.get(kind, -1))

    def start(self, run: Started, settings: Mapping[str, Any]) -> None:
        begun = not self.run.id
        with _silent():
            self.opened = OPEN[self.name](self.run, run.resumed_at)
            kept = {**_tracked(self.file), self.name: self.run}
            self.file.write_text(json.dumps({n: asdict(r) for n, r in kept.items()}), encoding="utf-8")
            if begun or self.name in ("wandb", "trackio"):  # mlflow refuses a setting that has changed
                self.opened.tracker.store_init_configuration(_config(self.job, run, settings))
        self.show(self.opened.shown)

    def on(self, event: Event) -> None:
        match event:
            case Stepped() if event.step > self.run.last.get("step", -1):
                memory = peak_memory(self.job.device)
                self._log(_step(event) | {"train/peak_memory_bytes": memory}, event.step)
            case Evaluated() if event.step > self.run.last.get("evaluated", -1):
                loss = Loss(event.loss, event.tokens)
                self._log({"eval/loss": loss.loss, "eval/perplexity": loss.perplexity}, event.step)
            case TrainReport():
                final = _final(event)
                self._log({f"final/{name}": value for name, value in final.items()}, event.steps)
                if self.name == "tensorboard":  # whose charts of one point say little
                    rows = [f"| {name} | {value:,.6g} |" for name, value in final.items()]
                    self._log({"final": "\n".join(["| figure | value |", "|---|---|", *rows])}, event.steps)
            case _:
                pass

    def close(self, failed: bool) -> None:
        if self.opened is None:
            return
        try:
            with _silent():
                self.opened.finish(failed)
        except Exception as error:  # the run is over: nobody is given notes any more
            self.warn(f"{self.name} could not finish: {type(error).__name__}: {error}")

    def _log(self, values: dict[str, Any], step: int) -> None:
        assert self.opened is not None
        with _silent():
            self.opened.tracker.log(values, step=step)


def trackers_of(job: Job, show: Callable[[str], None], warn: Callable[[str], None]) -> list[Listener]:
    """The trackers of a run, each once."""
    return [Tracker(job, name, show, warn) for name in dict.fromkeys(job.config.track)]


def _step(event: Stepped) -> dict[str, float]:
    return {
        "train/loss": event.loss,
        "train/learning_rate": event.learning_rate,
        "train/grad_norm": event.grad_norm,
        "train/tokens_per_second": event.tokens / max(1e-9, event.seconds),
        "train/epoch": event.epoch,
    }


def _final(report: TrainReport) -> dict[str, float]:
    """The figures of the report, by name: what the screen shows at the end."""
    names = ("trainable_params", "steps", "tokens", "supervised_tokens", "seconds", "tokens_per_second",
             "peak_memory_bytes", "memory_growth_bytes")  # fmt: skip
    found = {name: getattr(report, name) for name in names}
    for when, loss in report.eval.items():
        found |= {f"loss_{when}": loss.loss, f"perplexity_{when}": loss.perplexity}
    if report.predicted is not None:
        found["predicted_seconds"] = report.predicted.seconds
        found["predicted_memory_bytes"] = report.predicted.peak_memory_bytes
    if report.best is not None:
        found |= {"best_loss": report.best.loss, "best_step": report.best.step}
    return found


def _config(job: Job, run: Started, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, the plan and the environment as plain values: tensorboard takes no lists and no None."""
    plan = job.plan
    made = {
        "layers": index_ranges(plan.indices),
        "roles": plan.roles,
        "target_modules": plan.peft.target_modules,
        "adapted_modules": len(plan.modules),
        "cut": ", ".join(f"{stack}: {layer}" for stack, layer in plan.cut.items()),
        "trainable_params": plan.trainable_params,
        "total_params": plan.total_params,
    }
    size = {name: getattr(run, name) for name in ("steps", "rows", "held_out_rows", "tokens", "processes")}
    every = {n: v for n, v in settings.items() if n != "origin"}
    for group, values in (("plan", made), ("run", size), ("environment", run.environment)):
        every |= {f"{group}/{name}": value for name, value in values.items()}
    return {name: _plain(value) for name, value in every.items() if value not in (None, [], ())}


def _plain(value: Any) -> bool | int | float | str:
    """A list as its items, a long text cut, with a mark."""
    value = jsonable(value)
    if isinstance(value, (bool, int, float)):
        return value
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _tracked(file: Path) -> dict[str, TrackedRun]:
    """The runs that trackers have begun for this one, by tracker; none where the file is damaged."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return {name: TrackedRun(**run) for name, run in json.loads(file.read_text("utf-8")).items()}
    return {}


def _logged(folder: Path) -> dict[str, int]:
    """The last step that each kind of event was logged for before the run was cut off."""
    run = read_back(folder)
    found = {kind: [event["step"] for event in run.every(kind)] for kind in ("step", "evaluated")}
    return {kind: max(steps) for kind, steps in found.items() if steps}


@contextmanager
def _silent() -> Iterator[None]:
    """Around what a tracker does: stdout holds data alone, and some of them print there. wandb would ask for a key
    where it has none and stdin is a terminal."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.stdin = stdin


def _ready() -> None:
    """Accelerate's trackers write to its log, which wants to know the processes: these are of the CPU, so that no
    device is touched."""
    from accelerate import PartialState

    PartialState(cpu=True)


def _tensorboard(run: TrackedRun, step: int) -> Opened:
    """A folder of its own in `tensorboard/PROJECT`; what an earlier attempt logged after `step` is hidden."""
    from accelerate.tracking import TensorBoardTracker

    _ready()
    if not run.id:
        root = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or "tensorboard").absolute()
        run.place = str(root / _file_name(run.project))
        run.id = _free(Path(run.place), _file_name(run.name))
        purge = None
    else:
        run.last, purge = {"evaluated": step}, step + 1
    tracker = TensorBoardTracker(run.id, run.place, purge_step=purge)
    tracker.start()
    return Opened(tracker, f"tensorboard --logdir {_near(run.place)}", lambda failed: tracker.finish())


def _wandb(run: TrackedRun, step: int) -> Opened:
    """In `./wandb`, to be sent by `wandb sync`; to the server where somebody is logged in."""
    offline = not _wandb_is_set_up()
    if offline:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # over the network, from an offline run too
    os.environ.setdefault(
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1"
    )  # seconds that a kill may lose, not 15
    import wandb
    from accelerate.tracking import WandBTracker

    _ready()
    settings = wandb.Settings(console="off", silent=True)
    tracker = WandBTracker(
        run.project,
        name=run.name,
        id=run.id or None,
        resume="allow" if run.id else None,
        mode="offline" if offline else None,
        dir=os.environ.get("WANDB_DIR") or os.getcwd(),
        settings=settings,
    )
    tracker.start()
    run.id = tracker.run.id
    sync = f"wandb sync {_near(Path(tracker.run.dir).parent)}"
    shown = sync if tracker.run.offline else tracker.run.url or sync
    return Opened(tracker, shown, lambda failed: tracker.run.finish(exit_code=int(failed)))


def _wandb_is_set_up() -> bool:
    """Whether wandb is told where to go, or somebody is logged in to its server."""
    if any(os.environ.get(name) for name in WANDB_SET_UP):
        return True
    with suppress(OSError, NetrcParseError):
        logins = netrc(os.environ.get("NETRC"))
        return any(logins.authenticators(server) for server in WANDB_SERVERS)
    return False


def _mlflow(run: TrackedRun, step: int) -> Opened:
    """On the server of MLFLOW_TRACKING_URI, or in mlflow's own place: `./mlflow.db`."""
    for name, value in MLFLOW.items():
        os.environ.setdefault(name, value)
    import mlflow
    from accelerate.tracking import MLflowTracker

    _ready()
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        run.place = run.place or mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(run.place)
    tracker = MLflowTracker(run.project, run_id=run.id or None, run_name=run.name)
    tracker.start()
    run.id = tracker.tracker.info.run_id
    shown = (
        f"mlflow ui --backend-store-uri {shlex.quote(run.place)}" if run.place else mlflow.get_tracking_uri()
    )
    return Opened(tracker, shown, lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"))


def _trackio(run: TrackedRun, step: int) -> Opened:
    """In trackio's own place, or on the space or the server that its environment names."""
    import trackio
    from accelerate.tracking import TrackioTracker

    _ready()
    tracker = TrackioTracker(run.project, name=run.name, resume="must" if run.id else "never", embed=False)
    tracker.start()
    if run.id and tracker.run.id != run.id:
        trackio.finish()
        raise RunError(f"the run `{run.name}` of `{run.project}` is a newer one: it is not continued")
    # what it had not written when the run was killed is logged again
    written = getattr(tracker.run, "_next_step", 0) - 1
    run.last = {kind: min(last, written) for kind, last in run.last.items()}
    run.id = tracker.run.id
    shown = tracker.run.url or f"trackio show --project {shlex.quote(run.project)}"
    # the run's own finish would leave it to be finished again, with a line on stdout, when the process ends
    return Opened(tracker, shown, lambda failed: trackio.finish())


OPEN: dict[str, Callable[[TrackedRun, int], Opened]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _file_name(text: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "run"


def _free(folder: Path, name: str) -> str:
    """`NAME`, or the first of `NAME-2`, `NAME-3`, … that is not there."""
    number, free = 1, name
    while (folder / free).exists():
        number += 1
        free = f"{name}-{number}"
    return free


def _near(path: str | Path) -> str:
    """A path as it is typed from here."""
    path = Path(path)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
