"""The process, from its start: `lorafit …` and `python -m lorafit …`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from lorafit.estimate import start_over
from lorafit.system import quiet_libraries

STEPPING = ("train", "plan", "compare")  # the commands that run, or time, training steps


def main() -> NoReturn:
    """The entry point of the `lorafit` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for who calls it
    quiet_libraries()
    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") in STEPPING:
        start_over()
    from lorafit.cli import main as command

    command()


if __name__ == "__main__":
    main()
