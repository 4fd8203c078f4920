"""The commands, a file each: options in, one call each, an answer out.

torch, transformers and rich are imported in the bodies, so that every `--help` is instant.
"""

from __future__ import annotations

from typing import NoReturn

# isort: off
# the order of the commands in `lorafit --help`
from lorafit.cli import inspect, plan, train, evaluate, merge, push, presets, cache, help  # noqa: F401

# isort: on
from lorafit.cli.app import app
from lorafit.cli.shell import run_to_the_end

__all__ = ["app", "main"]


def main() -> NoReturn:
    """The command line, to the end of the process."""
    run_to_the_end(app)
