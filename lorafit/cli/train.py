"""`lorafit train`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.cli.app import app
from lorafit.cli.options import Config, Debug, Json, Push, Quiet, run_options
from lorafit.cli.push import push_folder
from lorafit.cli.shell import stopping
from lorafit.errors import OutOfMemory, RequestError
from lorafit.outputs import check_target

if TYPE_CHECKING:
    from lorafit.adapter import Plan
    from lorafit.estimate import Estimate, Forecast
    from lorafit.report.run import Run
    from lorafit.settings import Preset, RunConfig


@app.command()
@run_options("*")
def train(
    flags: Mapping[str, Any],
    config: Config = None,
    push_to_hub: Push = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an adapter: show the plan, do exactly that, evaluate before and after, save.

    Without a model and data, the embedded demo is used.
    """
    from lorafit.settings import derive_from_model, settle

    settings, chosen = settle(flags, config)

    from lorafit.adapter import planned
    from lorafit.data import find_sources
    from lorafit.estimate import predicted, prepare
    from lorafit.events import TrainReport
    from lorafit.model import chart_of, find, load_tokenizer, pick_device
    from lorafit.screen import Screen, TrainView, show_data, show_header, show_train_report
    from lorafit.system import without_collecting
    from lorafit.units import bytes_text

    screen = Screen(json, quiet)
    if settings.resume and settings.output is None:
        raise RequestError("--resume needs the run's folder", "name it with -o")
    if push_to_hub:
        from lorafit import hub

        hub.check(push_to_hub)
    source = find(settings.model)
    find_sources(settings)
    reads = settings.reads(source.place if source.local else "", config, chosen.path)
    target = Path(settings.output).expanduser() if settings.output is not None else None
    if target is not None:
        if settings.resume and target.exists() and not settings.overwrite:
            finished = _finished(settings, target)
            screen.line("done", f"{target} is a finished run: nothing to resume")
            if json:
                screen.document(finished.report)
            if push_to_hub:
                push_folder(screen, str(target), push_to_hub)
            return
        check_target(target, settings.overwrite, reads)
    found = chart_of(source)
    settings = derive_from_model(settings, found)
    made = planned(found, chosen, settings)
    show_header(screen, made, found, settings)

    with without_collecting():
        from lorafit.data import load
        from lorafit.train import RunFolder, assemble, claim, recorded, records, run

    pick_device(settings.device)
    tokenizer = load_tokenizer(source.place, source.name)
    with screen.bar("reading", bytes_text) as tick:
        rows = load(settings, tokenizer, found.task, found.vocab_size, tick)
    ahead, settings = prepare(settings, source, found, look=rows.look, seconds=1.0)
    cost = ahead.estimate(made, ahead.timing(made))
    show_data(screen, settings, rows.look)
    if target is None:
        folder = claim(_stem(found.model, made))
    else:
        folder = RunFolder(target)
        folder.open(settings.overwrite, settings.resume, reads)
    view = TrainView(screen)
    report = None
    try:
        with stopping() as stop:
            job = assemble(
                source, found, settings, made, rows, tokenizer, folder, stop, predicted(cost, made)
            )
            for event in recorded(job, run(job), [*records(job), view]):
                report = event if isinstance(event, TrainReport) else report
    except OutOfMemory as error:
        error.hint = _what_fits(ahead, made, chosen, cost) or error.hint
        raise
    finally:
        folder.abandon()
        view.close()
    assert report is not None
    if json:
        screen.document(report)
    else:
        show_train_report(screen, report)
    if push_to_hub:
        push_folder(screen, report.output, push_to_hub)


def _finished(settings: RunConfig, target: Path) -> Run:
    """The finished run that `--resume` names. Raises RequestError when it had other settings than are given
    now, or is not a run."""
    from lorafit.report import read_back
    from lorafit.settings import changed_settings

    run = read_back(target)
    if not run.settings:
        raise RequestError(f"`{target}` is not a run: there is no run.yaml to resume from", "another -o")
    for name, was, now in changed_settings(settings, run.settings):
        raise RequestError(
            f"`{target}` is a finished run with other settings: `{name}` was {was!r}, is {now!r}",
            "another -o trains a new run with these settings, --overwrite trains it again in its place",
        )
    return run


def _what_fits(ahead: Forecast, made: Plan, chosen: Preset, cost: Estimate) -> str:
    """The nearest settings that would have fitted, as a hint; empty where there are none."""
    from lorafit.estimate import free_on
    from lorafit.units import bytes_text

    free = min(free_on(ahead.device), cost.memory.peak - 1)
    nearest = ahead.fit(made, chosen, cost, ahead.timing(made), free).alternatives
    if not nearest:
        return ""
    return (
        f"{nearest[0].flags}: {bytes_text(nearest[0].peak)} by the plan, where this run was to take "
        f"{bytes_text(cost.memory.peak)}"
    )


def _stem(model: str, made: Plan) -> str:
    """`MODEL-PRESET-LAYERS`, in characters that a file name may have."""
    words = (model.rpartition("/")[2], made.preset, made.spec)
    return "-".join(re.sub(r"[^\w.]+", "-", word).strip("-.")[:60] for word in words)
