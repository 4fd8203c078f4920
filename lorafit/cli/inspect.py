"""`lorafit inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Debug, Json


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(help="Hub id, folder, config.json, or `demo`.", metavar="MODEL", show_default=False),
    ] = "demo",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the layer diagram and the role and size of every weight.

    From the config alone: no weights are read.
    """
    from lorafit.model import chart_of, find
    from lorafit.screen import Screen, show_map

    screen = Screen(json)
    found = chart_of(find(model))
    if json:
        screen.document(found)
    else:
        show_map(screen, found, model)
