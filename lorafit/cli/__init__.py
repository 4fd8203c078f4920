"""The commands, a file each: options in, one call each, an answer out.

torch, transformers and rich are imported in the bodies, so that every `--help` is instant.
"""

from __future__ import annotations

from typing import NoReturn

from lorafit.cli import (  # noqa: F401
    cache,
    chat,
    compare,
    data,
    env,
    evaluate,
    export,
    help,
    inspect,
    merge,
    plan,
    presets,
    push,
    runs,
    train,
)
from lorafit.cli.app import app, command_name
from lorafit.cli.shell import run_to_the_end

# the order in `lorafit --help`
ORDER = (
    "inspect",
    "data",
    "plan",
    "train",
    "compare",
    "runs",
    "eval",
    "chat",
    "merge",
    "export",
    "push",
    "presets",
    "cache",
    "env",
    "help",
)
app.registered_commands.sort(key=lambda command: ORDER.index(command_name(command)))

__all__ = ["app", "main"]


def main() -> NoReturn:
    """The command line, to the end of the process."""
    run_to_the_end(app)
