"""`lorafit presets`."""

from __future__ import annotations

from lorafit.cli.app import app
from lorafit.cli.options import Debug, Json


@app.command()
def presets(json: Json = False, debug: Debug = False) -> None:
    """List the strategies, the roles and the bands."""
    from lorafit.screen import Screen, show_presets
    from lorafit.settings import load_preset, preset_names

    screen = Screen(json)
    found = [load_preset(name) for name in preset_names()]
    if json:
        screen.document({"presets": found})
    else:
        show_presets(screen, found)
