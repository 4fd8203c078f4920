"""`lorafit runs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Debug, Json
from lorafit.errors import RequestError
from lorafit.outputs import RUNS
from lorafit.settings import OUTPUT


@app.command()
def runs(
    places: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="DIR...", help="Folders of runs, or runs. [dim]\\[runs][/]", show_default=False
        ),
    ] = None,
    sort: Annotated[
        Optional[str],
        typer.Option(
            "--sort",
            help="Sort by a column, e.g. `after`; `-after` is the other way round. [dim]\\[the newest first][/]",
            metavar="COLUMN",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        bool,
        typer.Option(
            "--csv",
            help="Print the table as CSV, with all columns.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List finished, running and unfinished runs: settings, losses, time, date."""
    from lorafit.report import find_runs, runs_text, sorted_by
    from lorafit.screen import Screen, show_runs

    if json and csv:
        raise RequestError("--json and --csv are two formats", "leave one of them out")
    if not places and not Path(RUNS).is_dir():
        raise RequestError(
            f"there is no folder `{RUNS}` here", "lorafit runs DIR, or lorafit train makes one"
        )
    rows = find_runs([Path(place).expanduser() for place in places or [RUNS]])
    if sort:
        rows = sorted_by(rows, sort)
    if json:
        Screen(json).document({"runs": rows})
    elif csv:
        sys.stdout.write(runs_text(rows))
    else:
        from lorafit.train import is_written

        running = {row.run for row in rows if not row.finished and is_written(Path(row.run))}
        show_runs(Screen(), rows, running)
