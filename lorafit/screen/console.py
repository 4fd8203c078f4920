"""The two streams: stdout carries the answer, stderr progress and notes. Tables and lines that all commands share.

Colour never carries meaning alone; without a terminal there are no bars. A narrow terminal shows a table's rows
one below the other: no figure is ever cut.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from lorafit.distributed import is_first
from lorafit.errors import LorafitError
from lorafit.jsonio import jsonable
from lorafit.screen.ascii import allow_ascii, is_unicode
from lorafit.units import count

if TYPE_CHECKING:
    from lorafit.report import Use

# A row's text is data: what would move the cursor or ring is shown as a picture of itself.
CONTROLS = {n: chr(0x2400 + n) for n in range(32) if chr(n) != "\n"} | {0x7F: "\u2421", 0x9B: "�"}

# A figure and its unit stay on one line; a space of any kind would be broken at, so another character stands for it.
UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMGT]?(?:B|FLOP)(?:/s)?|[kMGT]|ms|s|min|h|d)(?:[\s,.;:)]|$))")
JOINT = "\ue000"

LABEL = 11  # columns of the word at the head of a line
NARROWEST = 12  # columns that a wrapped column keeps
GAP = 2  # columns between two columns of a table


class Screen:
    """The two streams, and how much is shown on them."""

    def __init__(self, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet or not is_first()
        self.verbose = verbose
        self.said = 0  # lines on stderr, so far
        self.out = _console(sys.stdout)
        self.talk = _console(sys.stderr)
        # the stream itself is asked: FORCE_COLOR makes rich take a log for a terminal
        self.live = not self.quiet and self.talk.file.isatty() and not self.talk.is_dumb_terminal

    def document(self, data: Any) -> None:
        """One JSON document on stdout."""
        escaped = not is_unicode(sys.stdout)
        text = json.dumps(jsonable(data), indent=2, ensure_ascii=escaped, allow_nan=False)
        sys.stdout.write(text + "\n")

    def answer(self, text: str | Text | Table = "") -> None:
        """A line or a table of the answer; not under `--json`, where the document is the answer."""
        if not self.as_json:
            _print(self.out, text)

    def say(self, text: str | Text | Table = "") -> None:
        """Progress and notes: on stderr, not under `--quiet`."""
        if not self.quiet:
            self.said += _print(self.talk, text)

    def section(self, title: str, table: Table) -> None:
        """A table of the answer under its title, a blank line after it."""
        self.answer(f"[bold]{escape(title)}[/]")
        self.answer(table)
        self.answer()

    def line(self, label: str, text: str, answer: bool = False, most: int = 0) -> None:
        """`  label      text`, the text wrapped under itself, and cut after `most` lines unless that is 0."""
        console = self.out if answer else self.talk
        room = max(NARROWEST, console.width - LABEL - 2)
        lines = _wrapped(console, Text(text.translate(CONTROLS)), room) or [Text()]
        if 0 < most < len(lines):
            lines = [*lines[: most - 1], Text(f"{lines[most - 1].plain[: room - 1]}…")]
        for number, part in enumerate(lines):
            (self.answer if answer else self.say)(_labelled("" if number else label, part))

    def lines_of(self, text: str) -> int:
        """The lines on stderr that `line` would take for a text."""
        shown = Text(text.translate(CONTROLS))
        return len(_wrapped(self.talk, shown, max(NARROWEST, self.talk.width - LABEL - 2))) or 1

    def command(self, label: str, text: str, answer: bool = True) -> None:
        """`  label      text`, a command or a path to be copied: one line, however narrow the terminal."""
        if not (self.as_json if answer else self.quiet):
            (self.out if answer else self.talk).print(
                _labelled(label, Text(text)), highlight=False, soft_wrap=True
            )

    def commands(self, label: str, texts: Iterable[str]) -> None:
        """Commands to be copied, one below the other."""
        for number, text in enumerate(texts):
            self.command("" if number else label, text)

    def note(self, text: str, answer: bool = False) -> None:
        self.line("note", text, answer)

    def error(self, error: LorafitError) -> None:
        """`error: …` and `hint: …`."""
        for word, style, text in (("error:", "bold red", error.message), ("hint:", "bold", error.hint)):
            if text:
                line = Text.assemble((word, style), f" {text.translate(CONTROLS)}")
                self.talk.print(line, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(
        self, what: str, unit: Callable[[float], str] = lambda n: f"{n:,.0f}"
    ) -> Iterator[Callable[[float, float], None]]:
        """A progress bar on stderr for as long as the block lasts: call it with (done, total)."""
        if not self.live:
            yield lambda done, total: None
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30 if self.talk.width >= 70 else 8),
            TextColumn("{task.fields[shown]}"),
        )
        with Progress(*columns, console=self.talk, transient=True) as progress:
            task = progress.add_task(what, total=None, shown="")

            def tick(done: float, total: float) -> None:
                progress.update(task, completed=done, total=total, shown=f"{unit(done)} of {unit(total)}")

            yield tick


def show_uses(screen: Screen, uses: Iterable[Use]) -> None:
    """The lines for other tools."""
    for use in uses:
        screen.command("Python" if use.tool == "transformers" else use.tool, use.line)


class Table:
    """A table without lines, indented. `right` columns at the end are figures; column `fold` may wrap.

    Where even that is too wide, each row is a few lines of `name value` pairs.
    """

    def __init__(self, names: tuple[str, ...], right: int = 0, fold: int = 1) -> None:
        self.names, self.right, self.fold = names, right, fold
        self.rows: list[list[Text]] = []

    def add_row(self, *cells: str | Text) -> None:
        """A row, as markup or as texts; cells at the end may be left out."""
        texts = [Text.from_markup(cell, emoji=False) if isinstance(cell, str) else cell for cell in cells]
        self.rows.append([*texts, *(Text() for _ in self.names[len(texts) :])])

    @property
    def width(self) -> int:
        """The columns of the screen that it takes where nothing wraps."""
        return sum(self._widths) + GAP * (len(self.names) - 1)

    @property
    def _head(self) -> list[Text]:
        return [Text(f"  {name}" if number == 0 else name, "bold") for number, name in enumerate(self.names)]

    @property
    def _widths(self) -> list[int]:
        return [max(row[c].cell_len for row in (self._head, *self.rows)) for c in range(len(self.names))]

    def lines(self, console: Console) -> Iterator[Text]:
        """What is printed, in lines that fit the console."""
        every, widths = [self._head, *self.rows], self._widths
        room = console.width - GAP * (len(widths) - 1)
        if 0 <= self.fold < len(widths) and sum(widths) > room:
            widths[self.fold] = max(NARROWEST, room - sum(widths) + widths[self.fold])
        if sum(widths) > room:
            yield from self._stacked(console)
            return
        for row in every:
            yield from self._row(console, row, widths)

    def _row(self, console: Console, row: list[Text], widths: list[int]) -> Iterator[Text]:
        parts = [
            _wrapped(console, cell, widths[c]) if c == self.fold else [cell] for c, cell in enumerate(row)
        ]
        for number in range(max(map(len, parts))):
            line = Text()
            for c, (part, width) in enumerate(zip(parts, widths, strict=True)):
                cell = part[number] if number < len(part) else Text()
                pad = " " * (width - cell.cell_len)
                line.append(" " * GAP if c else "")
                line.append_text(Text.assemble(pad, cell) if c >= len(row) - self.right else cell.copy())
                line.append("" if c >= len(row) - self.right else pad)
            line.rstrip()
            yield line

    def _stacked(self, console: Console) -> Iterator[Text]:
        """Each row as `name value` pairs; words wrap, no figure is cut."""
        for row in self.rows:
            line, room = Text("  "), console.width - 2
            for c, (name, cell) in enumerate(zip(self.names, row, strict=True)):
                cell = cell.copy()
                while cell.plain.startswith(" "):
                    cell = cell[1:]
                if not cell.plain:
                    continue
                pair = Text.assemble((f"{name} ", "dim") if name.strip() and c else "", cell)
                if line.plain.strip() and line.cell_len + GAP + pair.cell_len > room:
                    yield from _hanging(console, line)
                    line, room = Text("    "), console.width
                line = Text.assemble(line, " " * GAP if line.plain.strip() else "", pair)
            yield from _hanging(console, line)


def table_of(*columns: str, right: int = 0, fold: int = 1) -> Table:
    """A table with these columns."""
    return Table(columns, right, fold)


def _print(console: Console, text: str | Text | Table) -> int:
    """Print it; the number of lines."""
    if isinstance(text, str):
        text = Text.from_markup(text, emoji=False)
    if isinstance(text, Table):
        lines = list(text.lines(console))
    else:
        lines = [text] if text.no_wrap else _wrapped(console, text, console.width) or [Text()]
    for line in lines:
        console.print(line, highlight=False)
    return len(lines)


def _hanging(console: Console, line: Text) -> Iterator[Text]:
    """The line, wrapped, and what follows its first line indented as a part of it."""
    body = line.plain.lstrip(" ")
    indent = len(line.plain) - len(body)
    for number, part in enumerate(_wrapped(console, line[indent:], max(NARROWEST, console.width - 4))):
        yield Text.assemble(" " * (4 if number else indent), part)


def _labelled(label: str, text: Text) -> Text:
    """A line with a word at its head; nothing behind its last word."""
    line = Text.assemble("  ", (f"{label:<{LABEL}}", "bold"), text)
    line.rstrip()
    return line


def _wrapped(console: Console, text: Text, width: int) -> list[Text]:
    """The text in lines of that many columns, broken between words; a word that is longer is broken too."""
    text = text.copy()
    text.plain = UNIT.sub(JOINT, text.plain)  # of the same length: styles stay where they are
    lines = text.wrap(console, max(1, width), overflow="fold")
    for line in lines:
        line.plain = line.plain.replace(JOINT, " ")
        line.rstrip()
    return list(lines)


def _console(stream: Any) -> Console:
    allow_ascii(stream)
    width = None
    if not stream.isatty():
        columns = os.environ.get("COLUMNS", "")
        width = (int(columns) if columns.isdecimal() else 0) or 100
    return Console(file=stream, width=width, soft_wrap=False)


def times_text(*sizes: int) -> str:
    return " × ".join(count(size) for size in sizes)


def clip(text: str, most: int = 400) -> str:
    """The text on one line, cut to `most` terminal columns; a cut text ends in `…`."""
    line = " ".join(text.split()).translate(CONTROLS)
    return line if cell_len(line) <= most else f"{set_cell_size(line, most - 1).rstrip()}…"
