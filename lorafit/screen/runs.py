"""`lorafit runs`: a table of runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.markup import escape

from lorafit.outputs import COMPARISON
from lorafit.report import RunRow
from lorafit.screen.console import Screen, Table, table_of
from lorafit.units import count, figures, seconds_text

CELLS: Mapping[str, Callable[[RunRow], str]] = {
    "model": lambda row: Path(row.model).name,
    "data": lambda row: row.data,
    "preset": lambda row: Path(row.preset).stem if row.preset.endswith((".yaml", ".yml")) else row.preset,
    "layers": lambda row: row.layers,
    "rank": lambda row: "" if row.rank is None else str(row.rank),
    "rate": lambda row: "" if row.learning_rate is None else figures(row.learning_rate, 2),
    "seed": lambda row: "" if row.seed is None else str(row.seed),
    "before": lambda row: _loss(row.before),
    "after": lambda row: _loss(row.after),
    "steps": lambda row: "" if row.steps is None else count(row.steps),
    "time": lambda row: "" if row.seconds is None else seconds_text(row.seconds),
    "date": lambda row: row.date[:10],
}
LEFT = ("model", "data", "preset", "layers")  # words; the other columns are figures
UNKNOWN = "–"  # a loss that was not measured
RESULTS = ("after", "steps", "time")  # columns also where all runs have the same
LEAST = ("time", "data", "model", "seed")  # left out of a table that is too wide, in this order
NAMED = ("preset", "layers")  # and then these, where the runs' names say them


def show_runs(screen: Screen, rows: Sequence[RunRow], running: Collection[str] = ()) -> None:
    """A line per run; those that are running or unfinished are marked, and how to go on with the latter is said.

    What all runs have in common is said once, above the table.
    """
    if not rows:
        screen.answer("no runs")
        screen.command("next", "lorafit train")
        return
    shared = {name: text for name, text in map(_shared(rows), CELLS) if text and name not in RESULTS}
    folder = _common_folder(rows)
    columns = [name for name in CELLS if name not in shared and any(CELLS[name](row) for row in rows)]
    tables = [_table(rows, running, columns, "."), _table(rows, running, columns, folder)]
    left_out: list[str] = []
    for name in (name for name in (*LEAST, *filter(partial(_is_named, rows), NAMED)) if name in columns):
        if min(table.width for table in tables) <= screen.out.width:
            break
        left_out.append(name)
        tables.append(_table(rows, running, [c for c in columns if c not in left_out], folder))
    table = next((table for table in tables if table.width <= screen.out.width), tables[-1])
    if table is not tables[0] and folder != ".":
        screen.command("folder", folder)
    if shared:
        texts = (f"{name} {text}" for name, text in shared.items())
        screen.line("all" if len(rows) > 1 else "run", ", ".join(texts), answer=True)
        screen.answer()
    screen.answer(table)
    screen.answer()
    if left_out:
        screen.note(f"a wider terminal shows {', '.join(left_out)} too, --csv all columns", answer=True)
    _show_going_on(screen, rows, running)


def _shared(rows: Sequence[RunRow]) -> Callable[[str], tuple[str, str]]:
    """Of a column its name, and the text that all rows have in it; empty where they differ."""

    def shared(name: str) -> tuple[str, str]:
        texts = {CELLS[name](row) for row in rows}
        return name, texts.pop() if len(texts) == 1 and texts != {UNKNOWN} else ""

    return shared


def _is_named(rows: Sequence[RunRow], column: str) -> bool:
    return all(CELLS[column](row) in Path(row.run).name for row in rows)


def _common_folder(rows: Sequence[RunRow]) -> str:
    """The folder in which all runs lie; `.` where there is none."""
    try:
        return os.path.commonpath([Path(row.run).parent for row in rows]) or "."
    except ValueError:  # some are absolute
        return "."


def _table(rows: Sequence[RunRow], running: Collection[str], columns: Sequence[str], folder: str) -> Table:
    """The table of these columns, the runs as they are named in a folder. Its width is what it asks for."""
    words = [name for name in columns if name in LEFT]
    table = table_of("run", *columns, right=len(columns) - len(words), fold=0)
    for row in rows:
        name = row.run if folder == "." else os.path.relpath(row.run, folder)
        cells = (escape(CELLS[column](row)) for column in columns)
        table.add_row(f"  {escape(name)}{_mark(row, running)}", *cells)
    return table


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _mark(row: RunRow, running: Collection[str]) -> str:
    return "" if row.finished else " running" if row.run in running else " *"


def _show_going_on(screen: Screen, rows: Sequence[RunRow], running: Collection[str]) -> None:
    """What the mark means, and the commands that go on with the unfinished runs: not with what is running."""
    stopped = [Path(row.run) for row in rows if not row.finished and row.run not in running]
    if not stopped:
        return
    compared = dict.fromkeys(run.parent for run in stopped if (run.parent / COMPARISON).is_file())
    alone = [run for run in stopped if run.parent not in compared]
    busy = {Path(run).parent for run in running}
    folders = [folder for folder in compared if folder not in busy]
    several = ["RUN is any of them"] if len(alone) > 1 else []
    several += ["DIR is the folder of any comparison"] if len(folders) > 1 else []
    screen.note("; ".join(["* is unfinished", *several]), answer=True)
    screen.commands("next", [*_resuming("train", alone, "RUN"), *_resuming("compare", folders, "DIR")])


def _resuming(command: str, places: Sequence[Path], any_of: str) -> Iterator[str]:
    if places:
        place = any_of if len(places) > 1 else str(places[0])
        yield shlex.join(["lorafit", command, "--resume", place])
