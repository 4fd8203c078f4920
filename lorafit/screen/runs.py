"""`lorafit runs`: a table of runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from lorafit.outputs import COMPARISON
from lorafit.report import RunRow
from lorafit.screen.console import Screen, table_of
from lorafit.units import count, figures, seconds_text

WIDE = 110  # columns from which on the table names model and data


def show_runs(screen: Screen, rows: Sequence[RunRow]) -> None:
    """A line per run; unfinished ones are marked, and how to go on with the last of them is said."""
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
            f"  {escape(row.run)}{'' if row.finished else ' *'}",
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
    unfinished = [row for row in rows if not row.finished]
    if unfinished:
        screen.answer()
        screen.note("* is unfinished", answer=True)
        run = Path(unfinished[0].run)
        compared = (run.parent / COMPARISON).is_file()
        words = ["compare", "--resume", str(run.parent)] if compared else ["train", "--resume", str(run)]
        screen.command("next", shlex.join(["lorafit", *words]))
