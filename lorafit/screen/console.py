"""The two streams: stdout carries the answer, stderr the talk. Tables and lines that all commands share.

Colour never carries meaning alone; without a terminal there are no bars.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lorafit.errors import LorafitError
from lorafit.jsonio import jsonable
from lorafit.units import count

# A row's text is data: what would move the cursor or ring is shown as a picture of itself.
CONTROLS = {n: chr(0x2400 + n) for n in range(32) if chr(n) != "\n"} | {0x7F: "\u2421", 0x9B: "�"}

LABEL = 11  # columns of the word at the head of a line


class Screen:
    """The two streams, and how much is said on them."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.out = _console(sys.stdout)
        self.talk = _console(sys.stderr)

    def document(self, data: Any) -> None:
        """One JSON document on stdout."""
        sys.stdout.write(json.dumps(jsonable(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def answer(self, text: str | Text | Table = "") -> None:
        """A line or a table of the answer; not under `--json`, where the document is the answer."""
        if not self.as_json:
            self.out.print(text, highlight=False)

    def say(self, text: str | Text | Table = "") -> None:
        """Talk: on stderr, not under `--quiet`."""
        if not self.quiet:
            self.talk.print(text, highlight=False)

    def section(self, title: str, table: Table) -> None:
        """A table of the answer under its title, a blank line behind it."""
        self.answer(f"[bold]{escape(title)}[/]")
        self.answer(table)
        self.answer()

    def line(self, label: str, text: str, answer: bool = False) -> None:
        """`  label      text`, the text wrapped under itself."""
        table = Table.grid(padding=(0, 0))
        table.add_column(width=LABEL + 2, no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(f"  [bold]{label}[/]", escape(text))
        (self.answer if answer else self.say)(table)

    def note(self, text: str, answer: bool = False) -> None:
        self.line("note", text, answer)

    def error(self, error: LorafitError) -> None:
        """`error: …` and `hint: …`."""
        self.talk.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
        if error.hint:
            self.talk.print(f"[bold]hint:[/] {escape(error.hint)}", highlight=False, soft_wrap=True)

    @contextmanager
    def bar(
        self, what: str, unit: Callable[[float], str] = lambda n: f"{n:,.0f}"
    ) -> Iterator[Callable[[float, float], None]]:
        """A bar on stderr for as long as the block lasts: call it with (done, total)."""
        if self.quiet or not self.talk.is_terminal:
            yield lambda done, total: None
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[said]}"),
        )
        with Progress(*columns, console=self.talk, transient=True) as progress:
            task = progress.add_task(what, total=None, said="")

            def tick(done: float, total: float) -> None:
                progress.update(task, completed=done, total=total, said=f"{unit(done)} of {unit(total)}")

            yield tick


def _console(stream: Any) -> Console:
    width = None
    if not stream.isatty():
        width = int(os.environ.get("COLUMNS", "0") or 0) or 100
    return Console(file=stream, width=width, soft_wrap=False)


def table_of(*columns: str, right: int = 0, fold: int = 1) -> Table:
    """A table without lines, indented: `right` columns at the end are figures, column `fold` may wrap."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        figure = number >= len(columns) - right
        title = f"  {name}" if number == 0 else name
        least = 12 if number == fold else None
        side = "right" if figure else "left"
        table.add_column(title, justify=side, no_wrap=number != fold, overflow="fold", min_width=least)
    return table


def times_text(*sizes: int) -> str:
    return " × ".join(count(size) for size in sizes)


def rows_text(number: int) -> str:
    return f"{count(number)} row{'' if number == 1 else 's'}"


def clip(text: str, most: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
