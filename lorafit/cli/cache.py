"""`lorafit cache`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Debug, Json


@app.command()
def cache(
    remove: Annotated[
        Optional[str],
        typer.Option(
            "--remove",
            help="Remove the cache whose key starts with this, or `all`.",
            metavar="KEY",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List or remove what is kept on disk for later runs."""
    from lorafit import cache as caches
    from lorafit.screen import Screen, show_caches, show_removed

    screen = Screen(json)
    folder = str(caches.cache_folder())
    if remove:
        many, freed = caches.remove_all() if remove == "all" else (1, caches.remove(remove))
        if json:
            screen.document({"removed": many, "bytes": freed})
        else:
            show_removed(screen, many, freed)
        return
    found = [*caches.kept(), *caches.small_kinds()]
    if json:
        screen.document({"folder": folder, "caches": found})
    else:
        show_caches(screen, folder, found)
