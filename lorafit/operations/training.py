"""A run from its settings to its report: resolved, its rows read and its cost foreseen, then trained as events."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from lorafit.adapter import check_continues, locate, planned
from lorafit.data import find_sources
from lorafit.distributed import World, asked_to_shard
from lorafit.errors import OutOfMemory, RequestError
from lorafit.estimate import TOO_MUCH, predicted, prepare
from lorafit.model import chart_of, check_tokenizer, find, load_tokenizer, pick_device
from lorafit.operations.compiling import check_compile
from lorafit.operations.going_on import going_on
from lorafit.operations.progress import Bar, no_bar
from lorafit.operations.resume import by_folder
from lorafit.operations.sharding import check_shard, settle_shard
from lorafit.outputs import check_target
from lorafit.report import read_back
from lorafit.settings import OPTIONS, changed_settings, dated, derive_from_model, settle
from lorafit.system import without_collecting
from lorafit.units import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.adapter import Plan
    from lorafit.data import Rows
    from lorafit.estimate import Estimate, Forecast
    from lorafit.events import Event
    from lorafit.model import ModelMap, ModelSource
    from lorafit.report import Run
    from lorafit.settings import Preset, RunConfig
    from lorafit.train import Listener, RunFolder


SEVERAL = "torchrun --nproc-per-node N -m lorafit train … --shard"


@dataclass(frozen=True, slots=True)
class Resolved:
    """A run before its rows are read: what it will adapt. `target` is the folder that was named, `reads` what must
    not be replaced by it."""

    settings: RunConfig
    source: ModelSource
    found: ModelMap
    chosen: Preset
    plan: Plan
    target: Path | None
    reads: Sequence[Path]


@dataclass(frozen=True, slots=True)
class Finished:
    """The run that --resume names is finished; `run` is None in the processes that do not read it."""

    folder: Path
    run: Run | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its model is loaded: what it will adapt, with its settings complete; its rows and its cost."""

    settings: RunConfig
    resolved: Resolved
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    ahead: Forecast
    cost: Estimate

    @property
    def plan(self) -> Plan:
        return self.resolved.plan

    @property
    def found(self) -> ModelMap:
        return self.resolved.found


def resolve_run(world: World, flags: Mapping[str, Any], config: str | None) -> Resolved | Finished:
    """What a run would adapt, or the finished run that --resume names. The first of several processes checks the
    folder. Raises RequestError for what is wrong before any row is read."""
    if asked_to_shard(os.environ):
        flags = {"shard": True, **flags}
    flags, config = by_folder(flags, config)
    settings, chosen = settle(going_on(flags, config), config)
    settings = settle_shard(settings, world.size, SEVERAL)
    if not Path(settings.model).expanduser().exists():  # else it may be data
        find(settings.model, settings.revision)
    find_sources(settings)
    source = find(settings.model, settings.revision)
    check_tokenizer(source.name, Path(source.place))
    reads = settings.reads(source.place if source.local else "", config, chosen.path)
    target = _target(settings, reads) if world.first else None
    resumed = target is not None and settings.resume and not settings.overwrite
    finished = str(target) if target is not None and resumed and target.exists() else ""
    if finished := world.told(finished):
        return Finished(Path(finished), _same_as(settings, Path(finished)) if world.first else None)
    found = chart_of(source)
    settings = derive_from_model(settings, found)
    settings = dated(settings, world.told(dated(settings).template_date or ""))
    made = planned(found, chosen, settings)
    check_shard(settings, made, found, source.place)
    check_compile(settings, found)
    if settings.from_adapter:
        check_continues(made, locate(settings.from_adapter), source.place)
    return Resolved(settings, source, found, chosen, made, target, reads)


def prepare_run(world: World, resolved: Resolved, bar: Bar = no_bar) -> Prepared:
    """Read the rows and foresee the cost. The first of several processes times the device; all read the rows."""
    with without_collecting():
        from lorafit.data import load

    settings, source, found = resolved.settings, resolved.source, resolved.found
    pick_device(settings.device)
    tokenizer = load_tokenizer(source.place, source.name)
    with bar("reading", bytes_text) as tick:
        rows = load(settings, tokenizer, found.task, found.vocab_size, tick)
    _same_rows(world, rows)
    ahead, settings = prepare(
        settings, source, found, look=rows.look, seconds=1.0, probing=world.first, processes=world.size
    )
    cost = ahead.estimate(resolved.plan, ahead.timing(resolved.plan))
    settings = settings.settled("prefix_residency", "auto", *cost.residency)
    return Prepared(settings, resolved, rows, tokenizer, ahead, cost)


def check_memory(run: Prepared, force: bool) -> str:
    """A warning when the predicted peak is more than the free memory, else nothing.

    Raises RequestError when it is more than TOO_MUCH times that, unless `force`.
    """
    free, peak = run.ahead.free, run.cost.memory.peak
    if peak <= free:
        return ""
    what = (
        f"the run needs {bytes_text(peak)} at its peak, and {bytes_text(free)} are free on {run.ahead.device}"
    )
    if peak <= TOO_MUCH * free or force:
        return what
    timing = run.ahead.timing(run.plan)
    fit = run.ahead.fit(run.plan, run.resolved.chosen, run.cost, timing, free).alternatives
    hint = f"{fit[0].flags} needs {bytes_text(fit[0].peak)}; " if fit else ""
    raise RequestError(what, f"{hint}--force starts it all the same")


def train_events(
    world: World,
    run: Prepared,
    stop: Callable[[], int],
    listeners: Sequence[Listener] = (),
    show: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[Event]:
    """Load the model and train it, as events that the first process records; the last is the report.

    `listeners` get every event first. `show` is given what shows the run in a tracker, `warn` what goes wrong there.
    `stop` returns the number of the signal that asks for an end, or 0. Raises as `lorafit.train.run` does.
    """
    with without_collecting():
        from lorafit.train import RunFolder, assemble, recorded, records, trackers_of
        from lorafit.train import run as steps

    resolved, folder = run.resolved, RunFolder(Path())
    with _explained(run):
        try:
            with world.one_error():
                if world.first:
                    folder = _opened(run)
                folder.target = Path(world.told(str(folder.target)))
                job = assemble(
                    resolved.source,
                    resolved.found,
                    run.settings,
                    resolved.plan,
                    run.rows,
                    run.tokenizer,
                    folder,
                    stop,
                    predicted(run.cost, resolved.plan),
                    world,
                )
            events = steps(job)
            if world.first:
                events = recorded(job, events, [*records(job), *trackers_of(job, show, warn), *listeners])
            yield from events
        finally:
            if world.first:
                folder.abandon()


def _opened(run: Prepared) -> RunFolder:
    """The folder that was named, or a new one in runs/, open for writing."""
    from lorafit.train import RunFolder, claim

    if run.resolved.target is None:
        return claim(_stem(run.found.model, run.plan))
    folder = RunFolder(run.resolved.target)
    folder.open(run.settings.overwrite, run.settings.resume, run.resolved.reads)
    return folder


def _same_rows(world: World, rows: Rows) -> None:
    """Raises RequestError when the first process read other rows than this one."""
    digests = [rows.train.digest, rows.held_out.digest]
    if world.told(digests) != digests:
        raise RequestError(
            "the rows differ from those of the first process", "the same data files on each machine"
        )


def _target(settings: RunConfig, reads: Sequence[Path]) -> Path | None:
    """The output folder that was named, if any. Raises RequestError when it may not be written."""
    if settings.output is None:
        return None
    target = Path(settings.output).expanduser()
    if not (settings.resume and target.exists() and not settings.overwrite):
        check_target(target, settings.overwrite, reads)
    return target


def _same_as(settings: RunConfig, target: Path) -> Run:
    """The finished run in that folder. Raises RequestError when it had other settings than are given now, or is not
    a run."""
    run = read_back(target)
    if not run.settings:
        raise RequestError(
            f"`{target}` is not a run: there is no run.yaml to resume from", "choose another -o"
        )
    for name, was, now in changed_settings(settings, run.settings):
        hint = "another -o trains a new run with these settings, --overwrite trains it again in its place"
        if name in ("epochs", "max_steps"):
            flag, place = OPTIONS[name].flag, shlex.quote(str(target))
            further = isinstance(was, (int, float)) and isinstance(now, (int, float)) and now > was
            more = f"{now - was:g}" if further else "N"
            hint = (
                f"to train its adapter further: lorafit train --from-adapter {place} {flag} {more}; "
                f"to train {now} from the start: another -o, or --overwrite in its place"
            )
        raise RequestError(
            f"`{target}` is a finished run with other settings: {OPTIONS[name].flag} was {_value(was)}, is {_value(now)}",
            hint,
        )
    return run


def _value(value: Any) -> str:
    return "not given" if value is None else f"`{value}`"


@contextmanager
def _explained(run: Prepared) -> Iterator[None]:
    """Where memory runs out, the error says what would have fitted."""
    try:
        yield
    except OutOfMemory as error:
        error.hint = _what_fits(run) or error.hint
        raise


def _what_fits(run: Prepared) -> str:
    """The nearest settings that would have fitted, as a hint; empty if there are none."""
    peak = run.cost.memory.peak
    free, timing = min(run.ahead.free, peak - 1), run.ahead.timing(run.plan)
    nearest = run.ahead.fit(run.plan, run.resolved.chosen, run.cost, timing, free).alternatives
    if not nearest:
        return ""
    return f"try {nearest[0].flags}: {bytes_text(nearest[0].peak)} planned, instead of {bytes_text(peak)}"


def _stem(model: str, made: Plan) -> str:
    """`MODEL-PRESET-LAYERS`, in characters that are safe in a file name."""
    words = (PurePath(model).name, made.preset, made.spec)
    return "-".join(re.sub(r"[^\w.]+", "-", word).strip("-.")[:60] for word in words)
