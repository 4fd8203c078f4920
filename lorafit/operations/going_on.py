"""`--from-adapter`: what a run takes from the adapter that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafit.outputs import RUN_FILE
from lorafit.settings import DATA, OPTIONS, WHAT

WHICH = ("preset", "layers", "modules", "include", "exclude", "stack")  # options that choose the modules
PROMPT = ("chat_template", "template_args", "end_token", "as_chat")  # how a prompt is written


def going_on(flags: Mapping[str, Any], config: str | None) -> Mapping[str, Any]:
    """The flags, and what none of them says from the adapter: its model, modules, rank, alpha and dropout; of a
    run also its data and held-out rows, or with --data how it writes prompts. Training options are those of any run.

    With a run file all of that is in the file. Raises RequestError when the adapter cannot be read.
    """
    if "from_adapter" not in flags or config is not None:
        return flags

    from lorafit.adapter import base_of, locate, run_of, settings_of
    from lorafit.settings import as_recorded

    folder = locate(flags["from_adapter"])
    taken = settings_of(folder)
    file = run_of(folder) / RUN_FILE
    if file.is_file():
        recorded = as_recorded(str(file))
        of_data = [n for n, option in OPTIONS.items() if option.panel == DATA and n != "template_date"]
        names = [n for n, option in OPTIONS.items() if option.panel == WHAT and n not in ("rank", "alpha")]
        names += PROMPT if "data" in flags else of_data
        taken = {name: taken[name] for name in ("rank", "alpha")}
        taken |= {
            name: getattr(recorded, name) for name in names if getattr(recorded, name) not in (None, ())
        }
        if "data" not in flags:  # the rows that it held out, also where its --seed chose them
            taken["data_seed"] = recorded.seed_of_data
    else:
        taken["model"] = base_of(folder)
    if any(name in flags for name in WHICH):
        taken = {name: value for name, value in taken.items() if name not in WHICH}
    return {**taken, **flags}
