"""`lorafit help`: the topics, and a page of the documentation."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping

from rich.markdown import Markdown
from rich.markup import escape

from lorafit.screen.console import Screen, table_of


def show_topics(screen: Screen, titles: Mapping[str, str]) -> None:
    """The topics with their titles."""
    table = table_of("topic", "about")
    for name, title in titles.items():
        table.add_row(f"  {name}", escape(title))
    screen.answer(table)
    screen.answer()
    screen.command("next", shlex.join(["lorafit", "help", next(iter(titles))]))


def show_topic(screen: Screen, text: str) -> None:
    """A page: laid out on a terminal, as Markdown where the output is a file or a pipe."""
    if screen.out.is_terminal:
        screen.out.print(Markdown(text))
    else:
        sys.stdout.write(text)
