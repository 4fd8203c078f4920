"""`lorafit cache`: what is kept on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from lorafit.screen.console import Screen, table_of
from lorafit.units import bytes_text, count


def show_caches(screen: Screen, folder: str, caches: Sequence[Any]) -> None:
    """What is kept on disk: a row each, and the total size."""
    if not caches:
        screen.line("cache", f"nothing in {folder}", answer=True)
        screen.note("`lorafit train --prefix-cache disk` makes one", answer=True)
        return
    table = table_of("key", "of", "what", "tokens", "bytes", "made", right=3, fold=2)
    for kept in caches:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.made))
        table.add_row(
            f"  {kept.key[:9]}",
            kept.kind,
            escape(kept.about),
            count(kept.tokens) if kept.tokens else "",
            bytes_text(kept.bytes),
            made,
        )
    screen.answer(table)
    screen.line("total", f"{bytes_text(sum(kept.bytes for kept in caches))} in {folder}", answer=True)
    screen.command("next", f"lorafit cache --remove {caches[0].key[:9]}")
    screen.command("", "lorafit cache --remove all")


def show_removed(screen: Screen, number: int, freed: int) -> None:
    """What was removed."""
    screen.line("removed", f"{number} cache{'' if number == 1 else 's'}, {bytes_text(freed)}", answer=True)
