"""`lorafit data`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Debug, Json, run_options
from lorafit.errors import RequestError
from lorafit.settings import DATA, OPTIONS, OUTPUT

if TYPE_CHECKING:
    from lorafit.data import RowSet

SHOWN = 2  # rows that are shown without --row


@app.command(name="data")
@run_options("model", *(name for name, option in OPTIONS.items() if option.panel == DATA), "seed")
def show(
    flags: Mapping[str, Any],
    row: Annotated[
        Optional[list[int]],
        typer.Option(
            "--row", min=1, help="Show this row, counted from 1. Repeatable.", rich_help_panel=OUTPUT, metavar="N",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Optional[str],
        typer.Option(
            "--output", "-o", help="Write the prepared rows (ids and labels) to this .jsonl file.",
            rich_help_panel=OUTPUT, metavar="FILE", show_default=False,
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Show the rows token by token: each piece, its id, whether it is in the loss.

    Training rows first, then those held out. No weights are read.
    """
    from lorafit.settings import dated, derive_from_model, settle

    settings, _ = settle(flags)

    from lorafit.data import find_sources
    from lorafit.model import chart_of, check_tokenizer, find, load_tokenizer
    from lorafit.screen import Screen, show_tokens
    from lorafit.system import without_collecting
    from lorafit.units import bytes_text

    screen = Screen(json)
    target = Path(output).expanduser() if output else None
    if target is not None and target.exists():
        raise RequestError(f"`{target}` exists", "name another file with --output")
    find_sources(settings)
    source = find(settings.model)
    check_tokenizer(source.name, Path(source.place))
    found = chart_of(source)
    settings = dated(derive_from_model(settings, found))
    with without_collecting():
        from lorafit.data import load, shown_tokens, write_rows
    tokenizer = load_tokenizer(source.place, source.name)
    with screen.bar("reading", bytes_text) as tick:
        rows = load(settings, tokenizer, found.task, found.vocab_size, tick)
    sets: tuple[RowSet, ...] = (rows.train, rows.held_out)
    every = len(rows.train) + len(rows.held_out)
    wanted = row or list(range(1, min(SHOWN, every) + 1))
    if too_large := [number for number in wanted if number > every]:
        raise RequestError(f"--row {too_large[0]}: there are {every:,} rows")
    shown = [shown_tokens(sets, number, tokenizer, found.task) for number in wanted]
    if target is not None:
        write_rows(target, sets)
    if json:
        screen.document({"data": rows.look, "rows": shown, "output": str(target) if target else None})
    else:
        show_tokens(screen, rows.look, shown, str(target) if target else "")
