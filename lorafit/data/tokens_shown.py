"""Rows token by token, for a person to check, and as a file for other tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.data.rows import IGNORED, Row, RowSet
from lorafit.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token: the text it stands for (a part of a character as the tokenizer writes it), its id, whether it
    is in the loss, and what it counts there."""

    piece: str
    id: int
    learned: bool
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row: its number among all, where it was read, whether it is held out, how many ids stand before the
    first that is learned, and its tokens; for sequence-to-sequence the decoder's come in `target`."""

    row: int
    where: str
    held_out: bool
    prompt: int
    tokens: tuple[ShownToken, ...]
    target: tuple[ShownToken, ...] = ()


def shown_tokens(
    sets: Sequence[RowSet], number: int, tokenizer: PreTrainedTokenizerBase, task: str
) -> ShownRow:
    """A row of several sets, counted from 1 over all of them."""
    row, held_out = _row(sets, number)
    weights = row.weights or (1.0,) * len(row.labels)
    if task == "seq2seq":
        source = tuple(_token(tokenizer, i, False) for i in row.ids)
        target = tuple(
            _token(tokenizer, i, True, weight)
            for i, weight in zip(row.labels, weights, strict=True)
            if i != IGNORED
        )
        return ShownRow(number, row.where, held_out, len(row.ids), source, target)
    marks = [label != IGNORED for label in row.labels]
    tokens = tuple(
        _token(tokenizer, i, learned, weight if learned else 1.0)
        for i, learned, weight in zip(row.ids, marks, weights, strict=True)
    )
    return ShownRow(number, row.where, held_out, row.prompt, tokens)


def _row(sets: Sequence[RowSet], number: int) -> tuple[Row, bool]:
    first = sets[0]
    return (first[number - 1], False) if number <= len(first) else (sets[1][number - 1 - len(first)], True)


def _token(tokenizer: PreTrainedTokenizerBase, number: int, learned: bool, weight: float = 1.0) -> ShownToken:
    piece = str(tokenizer.decode([number]))
    if "\ufffd" in piece or not piece:  # a part of a character, or a word mark
        piece = str(tokenizer.convert_ids_to_tokens(number))
    return ShownToken(piece, number, learned, weight)


def write_rows(path: Path, sets: Sequence[RowSet]) -> None:
    """All rows as JSON lines of `input_ids`, `labels` and, where not all are 1, `weights`, with where each was
    read and whether it is held out; `--format tokens` reads them as they are.

    Raises RequestError where the file cannot be written.
    """
    work = path.with_name(f".{path.name}.partial")
    try:
        with work.open("w", encoding="utf-8") as file:
            for held_out, rows in enumerate(sets):
                for row in rows:
                    line = {
                        "input_ids": row.ids,
                        "labels": row.labels,
                        "where": row.where,
                        "held_out": bool(held_out),
                        **({"weights": row.weights} if row.weights else {}),
                    }
                    file.write(json.dumps(line) + "\n")
        work.replace(path)
    except OSError as error:
        work.unlink(missing_ok=True)
        raise RequestError(
            f"cannot write `{path}`: {error.strerror}", "another place with --output"
        ) from None
