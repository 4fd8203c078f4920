"""All runs below some folders, finished and unfinished, a row each."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError, closest
from lorafit.outputs import PARTIAL, RUN_FILE
from lorafit.report.run import Run, read_back

DEEP = ("*", "*/*")  # where runs lie below a folder: in it, and in the comparisons in it


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run. `before` and `after` are held-out losses, `peak` bytes; what is not known is None. An unfinished run has
    the values of its last step."""

    run: str
    finished: bool
    model: str
    data: str
    preset: str
    layers: str
    rank: int | None
    learning_rate: float | None
    seed: int | None
    steps: int | None
    before: float | None
    after: float | None
    tokens_per_second: float | None
    peak: int | None
    seconds: float | None
    date: str
    lorafit: str
    torch: str


COLUMNS = tuple(each.name for each in fields(RunRow))


def find_runs(places: Sequence[Path]) -> list[RunRow]:
    """The runs in these folders, each once, the newest first. Raises RequestError for a folder that is not there."""
    found: dict[Path, RunRow] = {}
    for place in places:
        if not place.is_dir():
            raise RequestError(f"there is no folder `{place}`", "name a folder of runs, or a run")
        for folder in _folders(place):
            found.setdefault(folder.resolve(), row_of(read_back(folder)))
    return sorted(found.values(), key=lambda row: row.date, reverse=True)


def _folders(place: Path) -> Iterator[Path]:
    if (place / RUN_FILE).is_file():
        yield place
        return
    for pattern in DEEP:
        yield from (path.parent for path in sorted(place.glob(f"{pattern}/{RUN_FILE}")))


def row_of(run: Run) -> RunRow:
    """A run's row, from its settings and events; whatever is missing or damaged is None or empty."""
    settings, report, started = run.settings, run.report, run.first("started")
    environment = started.get("environment")
    known = environment if isinstance(environment, Mapping) else {}
    steps, measured = run.every("step"), run.every("evaluated")
    trained = [each for each in measured if each.get("step")]  # a resumed run measures the base again
    losses = report.get("eval") if isinstance(report.get("eval"), Mapping) else {}
    assert isinstance(losses, Mapping)
    last = steps[-1] if steps else {}
    data = settings.get("data") or []
    return RunRow(
        run=str(run.folder).removesuffix(PARTIAL),
        finished=bool(report) and not run.folder.name.endswith(PARTIAL),
        model=str(settings.get("model", "")),
        data=", ".join(Path(str(spec)).name for spec in data) if isinstance(data, list) else str(data),
        preset=str(settings.get("preset", "")),
        layers=str(settings.get("layers", "")),
        rank=_whole(settings.get("rank")),
        learning_rate=_number(settings.get("learning_rate")),
        seed=_whole(settings.get("seed")),
        steps=_whole(report.get("steps", last.get("step"))),
        before=_loss(losses.get("before"))
        if report
        else _number(measured[0].get("loss"))
        if measured
        else None,
        after=_loss(losses.get("after")) if report else _number(trained[-1].get("loss")) if trained else None,
        tokens_per_second=_number(report.get("tokens_per_second")),
        peak=_whole(report.get("peak_memory_bytes")),
        seconds=_number(report.get("seconds")),
        date=str(known.get("date", "")),
        lorafit=str(known.get("lorafit", "")),
        torch=str(known.get("torch", "")),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _loss(value: Any) -> float | None:
    return _number(value.get("loss")) if isinstance(value, Mapping) else None


SHOWN_AS = {"rate": "learning_rate", "time": "seconds"}  # columns that the table calls otherwise


def sorted_by(rows: Sequence[RunRow], column: str) -> list[RunRow]:
    """The rows by a column, the smallest first; `-after` is the other way round. What is not known comes last.

    Raises RequestError for a column that is not there.
    """
    name = column.removeprefix("-").replace("-", "_")
    name = SHOWN_AS.get(name, name)
    if name not in COLUMNS:
        raise RequestError(f"--sort: there is no column `{name}`", closest(name, COLUMNS))
    known = [row for row in rows if getattr(row, name) not in (None, "")]
    unknown = [row for row in rows if getattr(row, name) in (None, "")]
    return [*sorted(known, key=lambda row: getattr(row, name), reverse=column.startswith("-")), *unknown]


def runs_text(rows: Sequence[RunRow]) -> str:
    """The rows as CSV."""
    written = StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows([[getattr(row, name) for name in COLUMNS] for row in rows])
    return written.getvalue()
