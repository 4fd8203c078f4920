"""A run's folder, read back: its settings and what it said."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError
from lorafit.outputs import EVENTS, RUN_FILE
from lorafit.settings import read_yaml

DAMAGED = (KeyError, TypeError, ValueError, AttributeError)  # what a record lacks, or has as something else


@dataclass(frozen=True, slots=True)
class Run:
    """What a run was told and what it said; both are empty for a folder that is no run of ours."""

    folder: Path
    settings: dict[str, Any]
    events: tuple[dict[str, Any], ...]

    def first(self, kind: str) -> dict[str, Any]:
        """The first event of a kind; empty where there is none."""
        return next((e for e in self.events if e.get("event") == kind), {})

    def every(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, in their order."""
        return [e for e in self.events if e.get("event") == kind]

    @property
    def report(self) -> dict[str, Any]:
        """The report it ended with; empty for one that did not."""
        return {name: value for name, value in self.first("report").items() if name != "event"}

    @property
    def held_out_digest(self) -> str:
        """The digest of its held-out rows; empty where it states none."""
        return str(self.first("started").get("held_out_digest", ""))


def read_back(folder: Path) -> Run:
    """The run in a folder. A file that is missing or damaged is as good as empty."""
    settings: dict[str, Any] = {}
    events: list[dict[str, Any]] = []
    if (folder / RUN_FILE).is_file():
        with suppress(RequestError):  # damaged: what needs it reads it again, and says so
            settings = read_yaml(folder / RUN_FILE, "run file")
    with suppress(OSError, ValueError), (folder / EVENTS).open(encoding="utf-8") as file:
        for line in file:
            event = json.loads(line)
            if isinstance(event, dict):
                events.append(event)
    return Run(folder, settings, tuple(events))
