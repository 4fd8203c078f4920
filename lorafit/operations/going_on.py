"""`--from-adapter`: what a run takes from the adapter that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafit.outputs import RUN_FILE
from lorafit.settings import DATA, OPTIONS, WHAT, read_run_file

WHICH = ("preset", "layers", "modules", "include", "exclude", "stack")  # options that choose the modules
PROMPT = ("chat_template", "template_args", "end_token", "as_chat")  # how a prompt is written


def going_on(flags: Mapping[str, Any], config: str | None) -> Mapping[str, Any]:
    """The flags, and what none of them says from the adapter: its model, modules, rank, alpha and dropout; of a
    run also its data and held-out rows, or with --data how it writes prompts. Training options are those of any run.

    What a run file says stands too; that of a run says all of it. Raises RequestError when the adapter or the file
    cannot be read.
    """
    stored, origin = read_run_file(config) if config is not None else ({}, {})
    place = flags.get("from_adapter") or ("" if origin else stored.get("from_adapter"))
    if not place:
        return flags

    from lorafit.adapter import base_of, locate, run_of, settings_of
    from lorafit.settings import as_recorded

    said = {**stored, **flags}
    folder = locate(place)
    taken = settings_of(folder)
    file = run_of(folder) / RUN_FILE
    if file.is_file():
        recorded = as_recorded(str(file))
        of_data = [n for n, option in OPTIONS.items() if option.panel == DATA and n != "template_date"]
        names = [n for n, option in OPTIONS.items() if option.panel == WHAT and n not in ("rank", "alpha")]
        names += PROMPT if "data" in said else of_data
        taken = {name: taken[name] for name in ("rank", "alpha")}
        taken |= {
            name: getattr(recorded, name) for name in names if getattr(recorded, name) not in (None, ())
        }
        if "data" not in said:  # the rows that it held out, also where its --seed chose them
            taken["data_seed"] = recorded.seed_of_data
    else:
        taken["model"] = base_of(folder)
    if any(name in said for name in WHICH):
        taken = {name: value for name, value in taken.items() if name not in WHICH}
    return {**{name: value for name, value in taken.items() if name not in stored}, **flags}
