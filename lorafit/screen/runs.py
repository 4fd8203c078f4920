"""`lorafit runs`: a table of runs."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from lorafit.outputs import COMPARISON
from lorafit.report import RunRow
from lorafit.screen.console import Screen, table_of
from lorafit.units import count, figures, seconds_text

WIDE = 110  # columns from which on the table names model and data


def show_runs(screen: Screen, rows: Sequence[RunRow], running: Collection[str] = ()) -> None:
    """A line per run; those that are running or unfinished are marked, and how to go on with the latter is said."""
    if not rows:
        screen.answer("no runs")
        screen.command("next", "lorafit train")
        return
    wide = screen.out.width >= WIDE
    columns = [
        "run",
        *(["model", "data"] if wide else []),
        "preset",
        "layers",
        "rank",
        "rate",
        "seed",
        "steps",
    ]
    columns += ["before", "after", "time", "date"]
    table = table_of(*columns, right=8, fold=-1)
    for row in rows:
        named = [Path(row.model).name, row.data] if wide else []
        loss = ["–" if value is None else f"{value:.3f}" for value in (row.before, row.after)]
        table.add_row(
            f"  {escape(row.run)}{_mark(row, running)}",
            *(escape(text) for text in named),
            escape(Path(row.preset).stem if row.preset.endswith((".yaml", ".yml")) else row.preset),
            escape(row.layers),
            "" if row.rank is None else str(row.rank),
            "" if row.learning_rate is None else figures(row.learning_rate, 2),
            "" if row.seed is None else str(row.seed),
            "" if row.steps is None else count(row.steps),
            *loss,
            "" if row.seconds is None else seconds_text(row.seconds),
            row.date[:10],
        )
    screen.answer(table)
    screen.answer()
    _show_going_on(screen, rows, running)


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
