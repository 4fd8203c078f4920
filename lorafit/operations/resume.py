"""`lorafit train --resume RUN`: the folder of an unfinished run says all that is needed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError
from lorafit.outputs import PARTIAL, RUN_FILE, last_run


def by_folder(flags: Mapping[str, Any], config: str | None) -> tuple[Mapping[str, Any], str | None]:
    """The flags and the run file of a run that is resumed: its own run file, unless another is named.

    `--resume RUN` is read as a switch and the first argument, so without -o that argument is the run's folder.
    Raises RequestError when it is not one.
    """
    if not flags.get("resume") or flags.get("overwrite"):
        return flags, config
    given = dict(flags)
    target = _finished_name(
        Path(given["output"] if "output" in given else given.pop("model", "")).expanduser()
    )
    work = target.with_name(target.name + PARTIAL) if target.name else target
    own = next((folder / RUN_FILE for folder in (work, target) if (folder / RUN_FILE).is_file()), None)
    if own is None and "output" not in given:
        what = f"there is no run in `{target}` or `{target}{PARTIAL}`"
        last = last_run(unfinished=True)
        offer = (
            f"lorafit train --resume {shlex.quote(last)}"
            if last
            else "lorafit runs lists those that are there"
        )
        what = what if target.name else "--resume needs the run's folder"
        raise RequestError(what, f"{offer}; where it has not begun, the whole command: name it with -o DIR")
    given["output"] = str(target)
    return given, config or (str(own) if own else None)


def _finished_name(path: Path) -> Path:
    """The name that a run's folder has once it is finished."""
    if path.name.endswith(PARTIAL) and (path / RUN_FILE).is_file():
        return path.with_name(path.name.removesuffix(PARTIAL))
    return path
