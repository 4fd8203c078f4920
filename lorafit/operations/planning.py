"""What a run would adapt and what it costs: the plan, the rows and the forecast."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.adapter import check_continues, locate, planned
from lorafit.data import find_sources
from lorafit.errors import RequestError
from lorafit.estimate import parse_room, prepare
from lorafit.model import chart_of, check_tokenizer, find, weight_files
from lorafit.operations.compiling import check_compile
from lorafit.operations.going_on import going_on
from lorafit.operations.progress import Bar, no_bar
from lorafit.operations.sharding import check_shard, settle_shard
from lorafit.settings import (
    BANDS,
    OPTIONS,
    Preset,
    RunConfig,
    derive_from_model,
    load_preset,
    preset_names,
    settle,
)
from lorafit.units import bytes_text

if TYPE_CHECKING:
    from lorafit.adapter import Plan
    from lorafit.estimate import Estimate, Fit, Forecast
    from lorafit.events import DataReport
    from lorafit.model import ModelMap, ModelSource


@dataclass(frozen=True, slots=True)
class Planned:
    """What would be adapted, and what it costs; `data`, `estimate` and `fit` are None without an estimate.

    `settings` are complete: those that `train` runs with. `processes` is how many share a batch.
    """

    plan: Plan
    data: DataReport | None
    estimate: Estimate | None
    fit: Fit | None
    settings: RunConfig
    found: ModelMap
    processes: int = 1
    trainable: bool = True  # false where only a config is here, and no weights

    def as_json(self) -> dict[str, Any]:
        """The document of `lorafit plan --json`."""
        cost = None if self.estimate is None else self.estimate.as_json()
        return {**self.plan.as_json(), "data": self.data, "estimate": cost, "fit": self.fit}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A plan's model and settings, before any row is read; `room` is --fit's free memory."""

    settings: RunConfig
    chosen: Preset
    source: ModelSource
    found: ModelMap
    processes: int
    room: int | None

    @property
    def trainable(self) -> bool:
        """Whether the model that was named has weights, or may get them from the Hub."""
        place = Path(self.source.place)
        return not self.source.local or (place.is_dir() and bool(weight_files(place)))


def plan_run(
    flags: Mapping[str, Any],
    config: str | None = None,
    *,
    fit: str | None = None,
    processes: int | None = None,
    probe: bool = True,
    fresh: bool = False,
    estimate: bool = True,
    bar: Bar = no_bar,
) -> Planned:
    """What would be adapted and, with `estimate`, what it costs. No weights are read.

    Raises RequestError for what `train` would refuse.
    """
    asked = _asked(flags, config, fit, processes)
    made = planned(asked.found, asked.chosen, asked.settings)
    check_shard(asked.settings, made, asked.found, asked.source.place)
    check_compile(asked.settings, asked.found)
    if asked.settings.from_adapter:
        check_continues(made, locate(asked.settings.from_adapter), asked.source.place)
    if not estimate:
        return Planned(made, None, None, None, asked.settings, asked.found, asked.processes, asked.trainable)
    ahead, settings, free = _forecast(asked, probe, fresh, bar)
    timing = ahead.timing(made)
    cost = ahead.estimate(made, timing)
    fitting = ahead.fit(made, asked.chosen, cost, timing, free)
    return Planned(made, ahead.look, cost, fitting, settings, asked.found, asked.processes, asked.trainable)


def plan_matrix(
    flags: Mapping[str, Any],
    config: str | None = None,
    *,
    fit: str | None = None,
    processes: int | None = None,
    probe: bool = True,
    fresh: bool = False,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Every strategy in every band, with this run's rank, alpha and dropout: `model`, `free` bytes, `cells`."""
    asked = _asked(flags, config, fit, processes)
    check_shard(
        asked.settings, planned(asked.found, asked.chosen, asked.settings), asked.found, asked.source.place
    )
    check_compile(asked.settings, asked.found)
    ahead, settings, free = _forecast(asked, probe, fresh, bar)
    assert settings.rank is not None and settings.alpha is not None and settings.dropout is not None
    every = [load_preset(name) for name in preset_names()]
    every = [
        replace(
            preset,
            lora=replace(preset.lora, r=settings.rank, alpha=settings.alpha, dropout=settings.dropout),
        )
        for preset in every
    ]
    return {"model": ahead.found.model, "free": free, "cells": ahead.matrix(every, tuple(BANDS))}


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


def _asked(flags: Mapping[str, Any], config: str | None, fit: str | None, processes: int | None) -> _Asked:
    settings, chosen = settle(going_on(flags, config), config)
    several, room = parse_room(fit) if fit is not None else (None, None)
    if several is not None and processes not in (None, several):
        raise RequestError(
            f"--fit {fit} is {several} processes, and --processes is {processes}", "leave one of them out"
        )
    many = several or processes or 1
    settings = settle_shard(settings, many, "--processes N, or --fit Nx24GB")
    find_sources(settings, needed=False)
    source = find(settings.model, settings.revision)
    if settings.data:
        check_tokenizer(source.name, Path(source.place))
    found = chart_of(source)
    settings = derive_from_model(settings, found)
    return _Asked(settings, chosen, source, found, many, room)


def _forecast(asked: _Asked, probe: bool, fresh: bool, bar: Bar) -> tuple[Forecast, RunConfig, int]:
    """(the forecast, the settings completed from the rows, the bytes that are free)."""
    with bar("reading", bytes_text) as tick:
        ahead, settings = prepare(
            asked.settings,
            asked.source,
            asked.found,
            probing=probe,
            elsewhere=asked.room is not None,
            fresh=fresh,
            processes=asked.processes,
            room=asked.room,
            tick=tick,
        )
    return ahead, settings, ahead.free if asked.room is None else asked.room
