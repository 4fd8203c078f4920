"""`lorafit plan`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.going_on import going_on
from lorafit.cli.options import Config, Debug, Json, run_options
from lorafit.errors import RequestError
from lorafit.settings import OPTIONS, OUTPUT

if TYPE_CHECKING:
    from lorafit.estimate import Forecast
    from lorafit.screen import Screen
    from lorafit.settings import RunConfig

WITHOUT = (
    "output", "overwrite", "resume", "save_steps", "save_minutes", "keep", "eval_steps", "patience", "min_delta",
    "keep_last", "sample",
)  # fmt: skip


@app.command()
@run_options(*(name for name in OPTIONS if name not in WITHOUT))
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

    from lorafit.settings import settle

    settings, chosen = settle(going_on(flags, config), config)

    from lorafit.adapter import check_continues, locate, planned
    from lorafit.data import find_sources
    from lorafit.estimate import free_on, parse_room, prepare
    from lorafit.model import chart_of, check_tokenizer, find
    from lorafit.screen import Screen, show_plan
    from lorafit.settings import derive_from_model
    from lorafit.units import bytes_text

    screen = Screen(json)
    several, room = parse_room(fit) if fit is not None else (None, None)
    if several is not None and processes not in (None, several):
        raise RequestError(
            f"--fit {fit} is {several} processes, and --processes is {processes}", "leave one of them out"
        )
    several = several or processes or 1
    find_sources(settings, needed=False)
    source = find(settings.model, settings.revision)
    if settings.data:
        check_tokenizer(source.name, Path(source.place))
    found = chart_of(source)
    settings = derive_from_model(settings, found)
    made = None if matrix else planned(found, chosen, settings)
    command = train_command(flags, settings, config, several)
    if made is not None and settings.from_adapter:
        check_continues(made, locate(settings.from_adapter), source.place)
    if made is not None and not estimate:
        if json:
            screen.document({**made.as_json(), "data": None, "estimate": None, "fit": None})
        else:
            show_plan(screen, made, found, None, None, None, command)
        return
    with screen.bar("reading", bytes_text) as tick:
        ahead, settings = prepare(
            settings,
            source,
            found,
            probing=probe,
            elsewhere=room is not None,
            fresh=fresh,
            processes=several,
            room=room,
            tick=tick,
        )
    free = free_on(ahead.device) if room is None else room
    if made is None:
        _matrix(screen, ahead, settings, free)
        return
    timing = ahead.timing(made)
    cost = ahead.estimate(made, timing)
    fitting = ahead.fit(made, chosen, cost, timing, free)
    if json:
        screen.document({**made.as_json(), "data": ahead.look, "estimate": cost.as_json(), "fit": fitting})
    else:
        # the demo's rows are shown by `train`
        look = ahead.look if settings.data else None
        show_plan(screen, made, found, cost, fitting, look, command)


def _matrix(screen: Screen, ahead: Forecast, settings: RunConfig, free: int) -> None:
    """Every strategy in every band, with this run's rank, alpha and dropout."""
    from lorafit.screen import show_matrix
    from lorafit.settings import BANDS, load_preset, preset_names

    assert settings.rank is not None and settings.alpha is not None and settings.dropout is not None
    every = [load_preset(name) for name in preset_names()]
    every = [
        replace(
            preset,
            lora=replace(preset.lora, r=settings.rank, alpha=settings.alpha, dropout=settings.dropout),
        )
        for preset in every
    ]
    cells = ahead.matrix(every, tuple(BANDS))
    if screen.as_json:
        screen.document({"model": ahead.found.model, "free": free, "cells": cells})
    else:
        show_matrix(screen, ahead.found.model, cells, free)


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
