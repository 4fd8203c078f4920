"""The settings that an adapter was trained with, and the rows that its run held out."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from lorafit.adapter import run_of
from lorafit.data import RowSet, load, read_rows
from lorafit.errors import RequestError
from lorafit.model import ModelMap
from lorafit.outputs import HELD_OUT, RUN_FILE
from lorafit.report import read_back
from lorafit.settings import RunConfig, as_recorded, derive_from_model, settle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stored_settings(adapter: str, found: ModelMap) -> RunConfig:
    """The settings an adapter was trained with; the defaults where lorafit did not train it.

    Without its chat template: that is in its tokenizer.
    """
    path = run_of(adapter) / RUN_FILE
    settings = as_recorded(str(path)) if path.is_file() else settle({})[0]
    return derive_from_model(replace(settings, chat_template=None), found)


def check_holds_out(adapter: str) -> None:
    """Raises RequestError for an adapter that lorafit did not train, or a run that held no rows out."""
    file = run_of(adapter) / RUN_FILE
    if not file.is_file():
        raise RequestError(
            f"`{adapter}` was not trained by lorafit: it has no held-out rows", "name data with --data"
        )
    if not as_recorded(str(file)).holds_out:
        raise RequestError(
            f"`{adapter}` was trained with --holdout 0: it held no rows out", "name data with --data"
        )


def held_out_rows(adapter: str, tokenizer: PreTrainedTokenizerBase, found: ModelMap) -> RowSet:
    """The rows that a run held out: as they are stored in its folder, or in runs of earlier versions made
    again from its data and checked to be the same.

    Raises RequestError as `check_holds_out` does, and where the stored rows are damaged and the data changed.
    """
    check_holds_out(adapter)
    run = run_of(adapter)
    wanted = read_back(run).held_out_digest
    if (run / HELD_OUT).is_file():
        with suppress(ValueError, OSError, KeyError, SafetensorError):
            stored = read_rows(run / HELD_OUT)
            if stored.digest == wanted:
                return stored
    rows = load(stored_settings(adapter, found), tokenizer, found.task, found.vocab_size).held_out
    if rows.digest != wanted:
        raise RequestError(
            f"the data of `{adapter}` changed since it was trained: the held-out rows differ",
            "name data with --data",
        )
    return rows
