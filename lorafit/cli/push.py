"""`lorafit push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Debug, Json, Quiet

if TYPE_CHECKING:
    from lorafit.screen import Screen


@app.command()
def push(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A run's folder, or a merged model's.", show_default=False)
    ],
    name: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Its name on the Hub.", show_default=False)
    ],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Push an adapter or a merged model to the Hub, with its card and without the data.

    A new repository is private.
    """
    from lorafit.screen import Screen

    screen = Screen(json, quiet)
    address = push_folder(screen, folder, name)
    if json:
        screen.document({"folder": folder, "address": address})


def push_folder(screen: Screen, folder: str, name: str) -> str:
    """Push a folder, show its address and return it."""
    from lorafit import hub

    address = hub.push(Path(folder).expanduser(), name)
    screen.line("pushed", address, answer=True)
    return address
