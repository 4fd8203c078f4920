"""A run's rows: what they are like, and some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.cells import chop_cells
from rich.text import Text

from lorafit.events import DataReport
from lorafit.screen.console import CONTROLS, LABEL, Screen, table_of
from lorafit.settings import RunConfig
from lorafit.units import count, figures, percent, rows_text

if TYPE_CHECKING:
    from lorafit.data import ShownRow


SOURCES = 2  # that are named before training


def show_data(screen: Screen, config: RunConfig, look: DataReport) -> None:
    """A line on the rows before training; with --verbose their lengths, three of them, and what the rate and the
    batch were derived from."""
    _show_sources(screen, look, answer=False, most=len(look.sources) if screen.verbose else SOURCES)
    if not screen.verbose:
        return
    _show_lengths(screen, look, answer=False)
    _show_samples(screen, look, answer=False)
    reason = config.why("learning_rate")
    why = f" ({reason})" if config.origin.get("learning_rate", "").startswith("derived") else ""
    batch = (
        f" ({config.why('batch_size')})" if config.origin.get("batch_size", "").startswith("derived") else ""
    )
    screen.line("rate", f"learning rate {figures(config.learning_rate or 0, 2)}{why}, {config.scheduler}")
    rows_text = f"{config.batch_size} rows"
    if config.accumulate > 1:
        rows_text += f" × {config.accumulate} micro-batches"
    screen.line("step", f"{rows_text}{batch}, rows of up to {config.max_length} tokens")


def show_look(screen: Screen, look: DataReport, answer: bool) -> None:
    """What the rows are like, what was done to get them, and three of them."""
    _show_sources(screen, look, answer, len(look.sources))
    _show_lengths(screen, look, answer)
    for text in look.findings():
        screen.note(text, answer)
    _show_samples(screen, look, answer)


def _show_sources(screen: Screen, look: DataReport, answer: bool, most: int) -> None:
    """Show where the rows come from, naming at most `most` sources, and how many rows there are."""
    named = ", ".join(
        f"{s.name} ({s.format}{f', {s.weight:g} times' if s.weight != 1 else ''})"
        for s in look.sources[:most]
    )
    if len(look.sources) > most:
        named += f" and {count(len(look.sources) - most)} more"
    screen.line(
        "data",
        f"{named}: {rows_text(look.rows)}, {count(look.tokens)} tokens, "
        f"{percent(look.supervised_tokens, look.tokens)} supervised; "
        + (
            f"{rows_text(look.held_out_rows)} held out ({look.held_out_name})"
            if look.held_out_rows
            else "none held out"
        ),
        answer,
    )


def _show_lengths(screen: Screen, look: DataReport, answer: bool) -> None:
    at = look.lengths
    screen.line(
        "lengths",
        f"{count(at['min'])} to {count(at['max'])} tokens; half of the rows up to {count(at['p50'])}, "
        f"90 % up to {count(at['p90'])}, 99 % up to {count(at['p99'])}",
        answer,
    )


def _show_samples(screen: Screen, look: DataReport, answer: bool) -> None:
    for row in look.samples:
        screen.line(
            "row",
            f"{row.where}: {count(row.tokens)} tokens, {count(row.supervised_tokens)} in the loss (┃)",
            answer,
        )
        for text, learned in row.pieces:
            _show_piece(screen, text, learned, answer)


def show_tokens(screen: Screen, look: DataReport, rows: Sequence[ShownRow], written: str) -> None:
    """What the rows are like, and some of them token by token."""
    show_look(screen, replace(look, samples=()), answer=True)
    for row in rows:
        held = ", held out" if row.held_out else ""
        learned = sum(token.learned for token in (*row.tokens, *row.target))
        every = len(row.tokens) + len(row.target)
        screen.answer()
        screen.line(
            f"row {row.row}",
            f"{row.where.rpartition('/')[2]}{held}: {count(every)} tokens, {count(learned)} in the loss (┃), "
            f"{count(row.prompt)} before the first of them",
            answer=True,
        )
        table = table_of("token", "id", "", "text", right=0, fold=3)
        before = False
        for number, token in enumerate((*row.tokens, *row.target), 1):
            if number > 1 and token.learned != before:
                table.add_row(
                    "", "", "", Text("╌╌╌ in the loss from here" if token.learned else "╌╌╌ read only", "dim")
                )
            before = token.learned
            shown = token.piece.translate(CONTROLS).replace("\n", "⏎").replace(" ", "·")
            style = "bold" if token.learned else "dim"
            weight = f" ×{token.weight:g}" if token.weight != 1 else ""
            bar = "┃" if token.learned else "│"
            table.add_row(f"  {number}", str(token.id), bar + weight, Text(shown, style))
        screen.answer(table)
    if written:
        screen.line("written", written, answer=True)


PIECE_LINES = 3  # of a piece of a row that are shown


def _show_piece(screen: Screen, text: str, learned: bool, answer: bool) -> None:
    """A piece of a row behind a bar, a heavy one where it is learned; a long piece without its middle."""
    console = screen.out if answer else screen.talk
    bar, style = ("┃ ", "bold") if learned else ("│ ", "dim")
    room = max(20, console.width - LABEL - 4)
    shown = text.translate(CONTROLS).replace("\n", "⏎")
    lines = chop_cells(shown, room) or [""]
    if len(lines) > PIECE_LINES:
        last = (chop_cells(shown[::-1][:room], room - 1) or [""])[0]
        lines = [*lines[: PIECE_LINES - 1], f"…{last[::-1]}"]
    for line in lines:
        row = Text.assemble(" " * (LABEL + 2), (bar, "" if learned else "dim"), (line, style))
        row.no_wrap, row.overflow = True, "crop"
        (screen.answer if answer else screen.say)(row)
