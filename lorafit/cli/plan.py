"""`lorafit plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Config, Debug, Json, run_options
from lorafit.errors import RequestError
from lorafit.operations import PLANS, bounds
from lorafit.settings import OUTPUT


@app.command()
@run_options(*PLANS)
def plan(
    flags: Mapping[str, Any],
    config: Config = None,
    fit: Annotated[
        Optional[str],
        typer.Option(
            "--fit",
            help="Plan for another device with this much free memory, e.g. `24GB`; `4x24GB` for four.",
            metavar="SIZE",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        Optional[int],
        typer.Option(
            "--processes",
            help="Number of processes to plan for, as torchrun or accelerate would launch them.",
            metavar="N",
            **bounds("processes"),
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe",
            help="Time a block on this device, or assume a rate.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = True,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Time the device again instead of using an earlier timing.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = False,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix",
            help="Show every strategy and band in one table.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate/--no-estimate",
            help="Estimate memory and time.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what would be adapted and what it costs; no weights are read.

    Modules and layers, their names for PEFT, trainable parameters, peak memory, time.
    """
    from lorafit.operations import plan_matrix, plan_run, train_command
    from lorafit.screen import Screen, show_matrix, show_plan

    screen = Screen(json)
    if not estimate and (matrix or fit):
        other = "--matrix" if matrix else "--fit"
        raise RequestError(f"{other} is an estimate, and --no-estimate makes none", "leave one of them out")
    how: dict[str, Any] = {"fit": fit, "processes": processes, "probe": probe, "fresh": fresh}
    if matrix:
        every = plan_matrix(flags, config, **how, bar=screen.bar)
        if json:
            screen.document(every)
        else:
            show_matrix(screen, every["model"], every["cells"], every["free"])
        return
    made = plan_run(flags, config, **how, estimate=estimate, bar=screen.bar)
    if json:
        screen.document(made.as_json())
        return
    # the demo's rows are shown by `train`
    look = made.data if made.settings.data else None
    command = train_command(flags, made.settings, config, made.processes) if made.trainable else ""
    show_plan(screen, made.plan, made.found, made.estimate, made.fit, look, command, made.settings)
