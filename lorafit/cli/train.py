"""`lorafit train`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli.app import app
from lorafit.cli.going_on import going_on
from lorafit.cli.options import Config, Debug, Json, Push, Quiet, Verbose, run_options
from lorafit.cli.push import push_folder
from lorafit.cli.resume import by_folder
from lorafit.cli.shell import stopping
from lorafit.errors import OutOfMemory, RequestError
from lorafit.outputs import check_target
from lorafit.settings import OPTIONS, OUTPUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.adapter import Plan
    from lorafit.data import Rows
    from lorafit.distributed import World
    from lorafit.estimate import Estimate, Forecast
    from lorafit.events import TrainReport
    from lorafit.model import ModelMap, ModelSource
    from lorafit.report import Use
    from lorafit.screen import Screen
    from lorafit.settings import Preset, RunConfig
    from lorafit.train import Job, RunFolder


@app.command()
@run_options("*")
def train(
    flags: Mapping[str, Any],
    config: Config = None,
    push_to_hub: Push = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Start even where the predicted memory is more than twice what is free.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an adapter: show the plan, train, evaluate before and after, save.

    Without a model and data, the embedded demo is used.
    """
    from lorafit.distributed import connect, refuse_plugins
    from lorafit.screen import Screen, show_train_report

    world, screen = connect(), Screen(json, quiet, verbose)
    with world.one_error():
        refuse_plugins(os.environ)
        if push_to_hub:
            from lorafit import hub

            hub.check(push_to_hub)
        prepared = _prepared(world, screen, *by_folder(flags, config), force)
    if isinstance(prepared, Path):  # of a finished run
        if push_to_hub and world.first:
            push_folder(screen, str(prepared), push_to_hub)
        return
    report = _trained(world, screen, prepared)
    world.close()
    if json:
        screen.document(report)
    else:
        show_train_report(screen, report, _uses(prepared, report))
    if push_to_hub and world.first:
        push_folder(screen, report.output, push_to_hub)


def _uses(run: _Prepared, report: TrainReport) -> list[Use]:
    """The lines for other tools; the demo's base is nowhere but here."""
    from lorafit.model import split_revision
    from lorafit.report import uses_of_adapter

    if run.settings.model == "demo":
        return []
    base, behind = split_revision(run.settings.model)
    revision = run.settings.revision or behind
    return uses_of_adapter(run.plan, run.found.family, run.found.task, report.output, base, revision)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A run before its model is loaded: what it will do, its rows, its cost; `target` is the folder that was
    named, `reads` what must not be replaced by it."""

    settings: RunConfig
    source: ModelSource
    found: ModelMap
    chosen: Preset
    plan: Plan
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    target: Path | None
    reads: Sequence[Path]
    ahead: Forecast
    cost: Estimate


def _prepared(
    world: World, screen: Screen, flags: Mapping[str, Any], config: str | None, force: bool
) -> _Prepared | Path:
    """Everything before the model is loaded; the run's folder where --resume names a finished one.

    The first of several processes checks the folder and times the device; all read the rows.
    """
    from lorafit.settings import dated, derive_from_model, settle

    settings, chosen = settle(going_on(flags, config), config)

    from lorafit.adapter import check_continues, locate, planned
    from lorafit.data import find_sources
    from lorafit.estimate import prepare
    from lorafit.model import chart_of, check_tokenizer, find, load_tokenizer, pick_device
    from lorafit.screen import show_data, show_header
    from lorafit.system import without_collecting
    from lorafit.units import bytes_text

    find_sources(settings)
    source = find(settings.model, settings.revision)
    check_tokenizer(source.name, Path(source.place))
    reads = settings.reads(source.place if source.local else "", config, chosen.path)
    target = _target(settings, reads) if world.first else None
    resumed = target is not None and settings.resume and not settings.overwrite
    finished = str(target) if target is not None and resumed and target.exists() else ""
    if finished := world.told(finished):
        if world.first:
            _show_finished(screen, settings, Path(finished))
        return Path(finished)
    found = chart_of(source)
    settings = derive_from_model(settings, found)
    settings = dated(settings, world.told(dated(settings).template_date or ""))
    made = planned(found, chosen, settings)
    if settings.from_adapter:
        check_continues(made, locate(settings.from_adapter), source.place)
    show_header(screen, made, found, settings)

    with without_collecting():
        from lorafit.data import load

    pick_device(settings.device)
    tokenizer = load_tokenizer(source.place, source.name)
    with screen.bar("reading", bytes_text) as tick:
        rows = load(settings, tokenizer, found.task, found.vocab_size, tick)
    _same_rows(world, rows)
    ahead, settings = prepare(
        settings, source, found, look=rows.look, seconds=1.0, probing=world.first, processes=world.size
    )
    cost = ahead.estimate(made, ahead.timing(made))
    settings = settings.settled("prefix_residency", "auto", *cost.residency)
    show_data(screen, settings, rows.look)
    if world.first:
        for text in dict.fromkeys(ahead.notes):
            screen.note(text)
        _check_memory(screen, ahead, made, chosen, cost, force)
    return _Prepared(settings, source, found, chosen, made, rows, tokenizer, target, reads, ahead, cost)


def _trained(world: World, screen: Screen, run: _Prepared) -> TrainReport:
    """The model loaded and trained, shown and recorded by the first process."""
    from lorafit.estimate import predicted
    from lorafit.system import without_collecting

    with without_collecting():
        from lorafit.train import RunFolder, assemble

    folder = RunFolder(Path())
    with _explained(run.ahead, run.plan, run.chosen, run.cost), stopping(not world.alone) as stop:
        try:
            with world.one_error():
                if world.first:
                    folder = _opened(run)
                folder.target = Path(world.told(str(folder.target)))
                job = assemble(
                    run.source,
                    run.found,
                    run.settings,
                    run.plan,
                    run.rows,
                    run.tokenizer,
                    folder,
                    stop,
                    predicted(run.cost, run.plan),
                    world,
                )
            return _watched(screen, job)
        finally:
            if world.first:
                folder.abandon()


def _opened(run: _Prepared) -> RunFolder:
    """The folder that was named, or a new one in runs/, open for writing."""
    from lorafit.train import RunFolder, claim

    if run.target is None:
        return claim(_stem(run.found.model, run.plan))
    folder = RunFolder(run.target)
    folder.open(run.settings.overwrite, run.settings.resume, run.reads)
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


def _check_memory(
    screen: Screen, ahead: Forecast, made: Plan, chosen: Preset, cost: Estimate, force: bool
) -> None:
    """Warn when the predicted peak is more than the free memory.

    Raises RequestError when it is more than TOO_MUCH times that, unless `force`.
    """
    from lorafit.estimate import TOO_MUCH, free_on
    from lorafit.units import bytes_text

    free, peak = free_on(ahead.device), cost.memory.peak
    if peak <= free:
        return
    what = f"the run needs {bytes_text(peak)} at its peak, and {bytes_text(free)} are free on {ahead.device}"
    if peak <= TOO_MUCH * free or force:
        screen.note(what)
        return
    fit = ahead.fit(made, chosen, cost, ahead.timing(made), free).alternatives
    hint = f"{fit[0].flags} needs {bytes_text(fit[0].peak)}; " if fit else ""
    raise RequestError(what, f"{hint}--force starts it all the same")


def _show_finished(screen: Screen, settings: RunConfig, target: Path) -> None:
    """Say that the run which `--resume` names is finished.

    Raises RequestError when it had other settings than are given now, or is not a run.
    """
    from lorafit.report import read_back
    from lorafit.settings import changed_settings

    run = read_back(target)
    if not run.settings:
        raise RequestError(f"`{target}` is not a run: there is no run.yaml to resume from", "another -o")
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
            f"`{target}` is a finished run with other settings: `{name}` was {was!r}, is {now!r}", hint
        )
    screen.line("done", f"{target} is a finished run: nothing to resume")
    if screen.as_json:
        screen.document(run.report)


def _watched(screen: Screen, job: Job) -> TrainReport:
    """Run a job to its end, on the screen and into its folder; its report."""
    from lorafit.events import TrainReport
    from lorafit.screen import TrainView
    from lorafit.train import recorded, records, run, trackers_of

    view, report = TrainView(screen), None
    events = run(job)
    if job.world.first:
        trackers = trackers_of(job, lambda text: screen.command("tracking", text, answer=False), screen.note)
        events = recorded(job, events, [*records(job), *trackers, view])
    try:
        for event in events:
            report = event if isinstance(event, TrainReport) else report
    finally:
        view.close()
    assert report is not None
    return report


@contextmanager
def _explained(ahead: Forecast, made: Plan, chosen: Preset, cost: Estimate) -> Iterator[None]:
    """Where memory runs out, the error says what would have fitted."""
    try:
        yield
    except OutOfMemory as error:
        error.hint = _what_fits(ahead, made, chosen, cost) or error.hint
        raise


def _what_fits(ahead: Forecast, made: Plan, chosen: Preset, cost: Estimate) -> str:
    """The nearest settings that would have fitted, as a hint; empty if there are none."""
    from lorafit.estimate import free_on
    from lorafit.units import bytes_text

    free = min(free_on(ahead.device), cost.memory.peak - 1)
    nearest = ahead.fit(made, chosen, cost, ahead.timing(made), free).alternatives
    if not nearest:
        return ""
    return (
        f"try {nearest[0].flags}: {bytes_text(nearest[0].peak)} planned, instead of "
        f"{bytes_text(cost.memory.peak)}"
    )


def _stem(model: str, made: Plan) -> str:
    """`MODEL-PRESET-LAYERS`, in characters that are safe in a file name."""
    words = (model.rpartition("/")[2], made.preset, made.spec)
    return "-".join(re.sub(r"[^\w.]+", "-", word).strip("-.")[:60] for word in words)
