"""Building HTML: every text is escaped unless it is an `Html` already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Html(str):
    """Text that is markup already."""


def el(name: str, *inside: str | Iterable[str], **attributes: object) -> Html:
    """An element: its content is escaped unless it is `Html`; `cls` stands for `class`."""
    shown = "".join(
        f' {key.rstrip("_").replace("cls", "class").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{shown}>{_inner(inside)}</{name}>")


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], figures_from: int = 1, whole: bool = False
) -> Html:
    """A table in a frame that scrolls; the columns from `figures_from` on are right-aligned. One that may use the
    `whole` width of the window reaches beyond the text."""

    def cells(kind: str, row: Sequence[str]) -> Html:
        return el(
            "tr",
            [el(kind, c, cls="n" if n >= figures_from else "name") for n, c in enumerate(row)],
        )

    return el(
        "div",
        el("table", el("thead", cells("th", head)), el("tbody", [cells("td", row) for row in rows])),
        cls="wide whole" if whole else "wide",
    )


def _inner(parts: Iterable[str | Iterable[str]]) -> str:
    found = []
    for part in parts:
        if isinstance(part, Html):
            found.append(str(part))
        elif isinstance(part, str):
            found.append(escape(_shown(part)))
        else:
            found.append(_inner(part))
    return "".join(found)


def _shown(text: str) -> str:
    """The text with control characters and bidirectional overrides made visible."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t"
        else "�" if c in "\x7f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" or 0xD800 <= ord(c) < 0xE000
        else c
        for c in text
    )  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
