"""An example as it was read, before it is tokens; and how examples are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorafit.data.counts import Counts
from lorafit.data.messages import Message
from lorafit.data.source import Fault, refuse
from lorafit.errors import RequestError


@dataclass(frozen=True, slots=True)
class Example:
    """One example as it was read: `messages`, or `prompt` and `completion`, or `text`, or `ids` and `labels`.

    `where` is its file and line, `number` its place in the file; `group` is what --group-by keeps together.
    Of the messages, `skipped` are not learned though the assistant's; `weights` are what others count in the
    loss where that is not 1. `weight` is what the whole row counts, and `each` what each of its labels does.
    """

    where: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    asked: int = 0  # messages at the head that belong to the prompt: none of them is learned
    prompt: str = ""
    completion: str = ""
    text: str = ""
    number: int = 0
    ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    group: str = ""
    skipped: frozenset[int] = frozenset()
    weight: float = 1.0
    weights: Mapping[int, float] = field(default_factory=dict)
    each: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        if self.messages:
            return "messages"
        if self.ids:
            return "tokens"
        return "prompt-completion" if self.completion else "text"


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are read: the format, `--map`'s columns, the column that --group-by names, whether prompts and
    completions become turns; what is counted, and what is done with a bad row."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    group_by: str = ""
    as_chat: bool = False
    counts: Counts = field(default_factory=Counts)
    fault: Fault = refuse


class EmptyAnswer(RequestError):
    """A row whose answer is empty: left out and counted, as public data sets have some."""


class Blank(Exception):
    """A blank row: all of its cells are empty."""
