"""A run's folder, read back: its settings and its events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError
from lorafit.model import called
from lorafit.outputs import EVENTS, RUN_FILE
from lorafit.settings import read_yaml
from lorafit.units import count

DAMAGED = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
)  # a record with a missing key or a value of another type


@dataclass(frozen=True, slots=True)
class Run:
    """The settings and events of a run; both are empty for a folder that is not a lorafit run."""

    folder: Path
    settings: dict[str, Any]
    events: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        return called(self.folder)

    def first(self, kind: str) -> dict[str, Any]:
        """The first event of a kind; empty if there is none."""
        return next((e for e in self.events if e.get("event") == kind), {})

    def every(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, in order."""
        return [e for e in self.events if e.get("event") == kind]

    @property
    def report(self) -> dict[str, Any]:
        """The final report; empty for an unfinished run."""
        return {name: value for name, value in self.first("report").items() if name != "event"}

    @property
    def held_out_digest(self) -> str:
        """The digest of the held-out rows; empty if it was not recorded."""
        return str(self.first("started").get("held_out_digest", ""))


def read_back(folder: Path) -> Run:
    """The run in a folder. A missing or damaged file counts as empty."""
    settings: dict[str, Any] = {}
    events: list[dict[str, Any]] = []
    if (folder / RUN_FILE).is_file():
        with suppress(RequestError):  # damaged: whoever needs it reads it again and reports it
            settings = read_yaml(folder / RUN_FILE, "run file")
    with suppress(OSError, ValueError), (folder / EVENTS).open(encoding="utf-8") as file:
        for line in file:
            event = json.loads(line)
            if isinstance(event, dict):
                events.append(event)
    return Run(folder, settings, tuple(events))


def steps_text(report: Mapping[str, Any]) -> str:
    """`87 steps`, or which of them the adapter is of: `step 40, the best of 87`."""
    steps, own = int(report["steps"]), int(report.get("adapter_step") or report["steps"])
    return f"{count(steps)} steps" if own == steps else f"step {count(own)}, the best of {count(steps)}"


def name_without(adapters: Sequence[object]) -> str:
    """What the model without an adapter is called: the base of these, or the one model that was scored."""
    return "base" if adapters else "model"
