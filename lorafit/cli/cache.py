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
    found = [*caches.kept(), *caches.small_kinds()]
    if remove:
        keys = [entry.key for entry in found] if remove == "all" else [remove]
        freed = sum(caches.remove(key) for key in keys)
        if json:
            screen.document({"removed": len(keys), "bytes": freed})
        else:
            show_removed(screen, len(keys), freed)
        return
    if json:
        screen.document({"folder": folder, "caches": found})
    else:
        show_caches(screen, folder, found)
