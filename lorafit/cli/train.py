"""`lorafit train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Config, Debug, Json, Push, Quiet, Verbose, run_options
from lorafit.cli.push import push_folder
from lorafit.cli.shell import stopping
from lorafit.settings import OUTPUT

if TYPE_CHECKING:
    from lorafit.distributed import World
    from lorafit.events import TrainReport
    from lorafit.operations import Finished, Prepared, Resolved
    from lorafit.report import Use
    from lorafit.screen import Screen


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
    from lorafit.distributed import connect
    from lorafit.operations import Finished, resolve_run
    from lorafit.screen import Screen, show_train_report

    world, screen = connect(), Screen(json, quiet, verbose)
    with world.one_error():
        if push_to_hub:
            from lorafit import hub

            hub.check(push_to_hub)
        resolved = resolve_run(world, flags, config)
        if not isinstance(resolved, Finished):
            prepared = _prepared(world, screen, resolved, force)
    if isinstance(resolved, Finished):
        _show_finished(screen, resolved)
        if push_to_hub and world.first:
            push_folder(screen, str(resolved.folder), push_to_hub)
        return
    report = _trained(world, screen, prepared)
    world.close()
    if json:
        screen.document(report)
    else:
        show_train_report(screen, report, _uses(prepared, report))
    if push_to_hub and world.first:
        push_folder(screen, report.output, push_to_hub)


def _prepared(world: World, screen: Screen, resolved: Resolved, force: bool) -> Prepared:
    """What the run will do, shown; its rows and its cost."""
    from lorafit.operations import check_memory, prepare_run
    from lorafit.screen import show_data, show_header

    show_header(screen, resolved.plan, resolved.found, resolved.settings)
    prepared = prepare_run(world, resolved, screen.bar)
    show_data(screen, prepared.settings, prepared.rows.look)
    if world.first:
        for text in dict.fromkeys(prepared.ahead.notes):
            screen.note(text)
        if warning := check_memory(prepared, force):
            screen.note(warning)
    return prepared


def _show_finished(screen: Screen, finished: Finished) -> None:
    """Say that the run which `--resume` names is finished."""
    if finished.run is None:
        return
    screen.line("done", f"{finished.folder} is a finished run: nothing to resume")
    if screen.as_json:
        screen.document(finished.run.report)


def _trained(world: World, screen: Screen, run: Prepared) -> TrainReport:
    """Run it to its end, on the screen; its report."""
    from lorafit.events import TrainReport
    from lorafit.operations import train_events
    from lorafit.screen import TrainView

    view, report = TrainView(screen), None
    with stopping(not world.alone) as stop:
        try:
            for event in train_events(
                world,
                run,
                stop,
                [view],
                lambda text: screen.command("tracking", text, answer=False),
                screen.note,
            ):
                report = event if isinstance(event, TrainReport) else report
        finally:
            view.close()
    assert report is not None
    return report


def _uses(run: Prepared, report: TrainReport) -> list[Use]:
    """The lines for other tools; the demo's base is nowhere but here."""
    from lorafit.model import split_revision
    from lorafit.report import uses_of_adapter

    if run.settings.model == "demo":
        return []
    base, behind = split_revision(run.settings.model)
    revision = run.settings.revision or behind
    return uses_of_adapter(run.plan, run.found.family, run.found.task, report.output, base, revision)
