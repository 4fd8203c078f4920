"""`lorafit env`."""

from __future__ import annotations

from lorafit.cli.app import app
from lorafit.cli.options import Debug, Json


@app.command()
def env(json: Json = False, debug: Debug = False) -> None:
    """Show versions and the machine, for bug reports."""
    from lorafit.screen import Screen
    from lorafit.system import environment, graphics

    screen = Screen(json)
    found = {**environment(), **graphics()}
    if json:
        screen.document(found)
        return
    for name, value in found.items():
        screen.answer(f"  {name:<14}{value}")
