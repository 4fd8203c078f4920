"""What can go wrong, said in one line and a next step; and the exit codes.

0  done
1  the run failed (out of memory, a loss that is no number, a merge that did not verify)
2  the request was wrong (no such model, layer, file; nothing was done, nothing is left behind)
130, 143  interrupted by Ctrl-C, by SIGTERM
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

DONE, FAILED, WRONG, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class LorafitError(Exception):
    """An error a person can act on: what happened with the value in it, and what to do next.

    `message` is lower-case with no final stop, names in backticks; `hint` is the next
    command or the nearest good value, and may be empty.
    """

    exit_code = FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RequestError(LorafitError):
    """What was asked for cannot be done, and nothing was begun."""

    exit_code = WRONG


class RunError(LorafitError):
    """What was begun could not be brought to its end."""

    exit_code = FAILED


class OneProcess(RunError):
    """What ends a run and the other processes cannot see: the one that it happens to shows it."""


class OutOfMemory(OneProcess):
    """Memory ran out in a run; whoever planned it knows what would have fit."""


class Interrupted(LorafitError):
    """A run was stopped from outside; what it had is kept, and the hint says how to go on."""

    def __init__(self, message: str, hint: str, signal: int) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal


def closest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """`did you mean `ffn`?` when one of the known words is near, else `otherwise`, or all of them in a row."""
    words = sorted(known)
    near = get_close_matches(word.lower(), [w.lower() for w in words], n=1, cutoff=0.6)
    if near:
        return f"did you mean `{next(w for w in words if w.lower() == near[0])}`?"
    return otherwise or "there are " + ", ".join(f"`{w}`" for w in words)
