"""What a comparison leaves in its folder: the answer as JSON, its table as CSV, its page."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from io import StringIO
from typing import TYPE_CHECKING, Any

from lorafit.compare.answer import Answer, ChoiceRow
from lorafit.compare.folder import ANSWER, PAGE, TABLE, CompareFolder
from lorafit.compare.page import RowApart, compare_page, most_apart
from lorafit.compare.results import Outcome
from lorafit.data import RowSet, rendered
from lorafit.model import ModelMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# columns of the table, each by the name of its field
COLUMNS = (
    "choice", "preset", "layers", "rank", "learning_rate", "seeds", "loss", "spread", "delta", "error", "p", "verdict",
    "gain", "gain_error", "accuracy", "trainable_params", "adapter_bytes", "steps", "seconds", "tokens_per_second", "peak", "growth", "fast",
    "small",
)  # fmt: skip


def table_text(answer: Answer) -> str:
    """The table as CSV, a line a choice; each text of --also has two columns at the end."""
    files = [each.file for each in answer.choices[0].also] if answer.choices else []
    written = StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow([*COLUMNS, *(f"{kind} {file}" for file in files for kind in ("forgetting", "error"))])
    for row in answer.choices:
        beside = [value for each in row.also for value in (each.delta, each.stderr)]
        lines.writerow([*(_cell(row, name) for name in COLUMNS), *beside])
    return written.getvalue()


def _cell(row: ChoiceRow, name: str) -> Any:
    value = getattr(row, name)
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def write_answer(
    folder: CompareFolder,
    answer: Answer,
    found: ModelMap,
    outcomes: Mapping[str, Outcome],
    held_out: RowSet,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the answer, its table and its page. Raises RunError where the folder cannot be written."""
    apart = []
    for number, losses in most_apart(outcomes, answer.choices):
        shown = rendered(held_out[number], tokenizer, found.task)
        apart.append(RowApart(shown.where, "".join(text for text, _ in shown.pieces), losses))
    folder.write_json(ANSWER, answer)
    folder.write(TABLE, table_text(answer))
    folder.write(PAGE, compare_page(answer, found, apart))
