"""`lorafit plan`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Config, Debug, Json, run_options
from lorafit.operations import PLANS
from lorafit.settings import OPTIONS, OUTPUT

if TYPE_CHECKING:
    from lorafit.settings import RunConfig


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
            min=1,
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
    from lorafit.operations import plan_matrix, plan_run
    from lorafit.screen import Screen, show_matrix, show_plan

    screen = Screen(json)
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
    command = train_command(flags, made.settings, config, made.processes)
    show_plan(screen, made.plan, made.found, made.estimate, made.fit, look, command)


def train_command(flags: Mapping[str, Any], settings: RunConfig, file: str | None, processes: int = 1) -> str:
    """The command that trains what was planned."""
    launcher = ["torchrun", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    words = [*launcher, "lorafit", "train"]
    if file is not None:
        words += ["--config", file]
    if "model" in flags and settings.model != "demo":
        words.append(settings.model)
    for name, value in flags.items():
        if name == "model":
            continue
        flag = OPTIONS[name].flag
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for item in value if isinstance(value, (list, tuple)) else (value,):
                words += [flag, str(item)]
    if settings.model != "demo" and not settings.data:
        words += ["--data", "FILE"]
    return shlex.join(words)
