"""How an operation tells how far it is: a bar on the screen, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Tick = Callable[[float, float], None]  # called with what is done and the total


class Bar(Protocol):
    """Shows progress for as long as its block lasts; `unit` writes an amount."""

    def __call__(self, what: str, unit: Callable[[float], str] = ...) -> AbstractContextManager[Tick]: ...


@contextmanager
def no_bar(what: str, unit: Callable[[float], str] = str) -> Iterator[Tick]:
    """Shows nothing."""
    yield lambda done, total: None
