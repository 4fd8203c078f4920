"""Data: files to examples, examples to rows of tokens, rows to batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.data.batching import MASKED_SHARE as MASKED_SHARE
    from lorafit.data.batching import MicroBatch as MicroBatch
    from lorafit.data.batching import batches as batches
    from lorafit.data.batching import in_epoch as in_epoch
    from lorafit.data.batching import in_order as in_order
    from lorafit.data.collate import Batch as Batch
    from lorafit.data.collate import collate_rows as collate_rows
    from lorafit.data.collate import mask_row as mask_row
    from lorafit.data.collate import run_along as run_along
    from lorafit.data.counts import Counts as Counts
    from lorafit.data.dataset import Rows as Rows
    from lorafit.data.dataset import chat_template_of as chat_template_of
    from lorafit.data.dataset import files_of as files_of
    from lorafit.data.dataset import labelled as labelled
    from lorafit.data.dataset import load as load
    from lorafit.data.dataset import prepare as prepare
    from lorafit.data.dataset import read_eval_rows as read_eval_rows
    from lorafit.data.ends import end_tokens as end_tokens
    from lorafit.data.ends import write_generation_config as write_generation_config
    from lorafit.data.files import find_files as find_files
    from lorafit.data.files import find_sources as find_sources
    from lorafit.data.last_turn import last_user_turn as last_user_turn
    from lorafit.data.report import rendered as rendered
    from lorafit.data.rows import IGNORED as IGNORED
    from lorafit.data.rows import Row as Row
    from lorafit.data.rows import RowSet as RowSet
    from lorafit.data.rows import read_rows as read_rows
    from lorafit.data.rows import save_rows as save_rows
    from lorafit.data.template import ChatTemplate as ChatTemplate
    from lorafit.data.tokens_shown import ShownRow as ShownRow
    from lorafit.data.tokens_shown import shown_tokens as shown_tokens
    from lorafit.data.tokens_shown import write_rows as write_rows

__getattr__ = door(
    __name__,
    {
        "batching": "MASKED_SHARE MicroBatch batches in_epoch in_order",
        "collate": "Batch collate_rows mask_row run_along",
        "counts": "Counts",
        "dataset": "Rows chat_template_of files_of labelled load prepare read_eval_rows",
        "ends": "end_tokens write_generation_config",
        "files": "find_files find_sources",
        "last_turn": "last_user_turn",
        "report": "rendered",
        "rows": "IGNORED Row RowSet read_rows save_rows",
        "template": "ChatTemplate",
        "tokens_shown": "ShownRow shown_tokens write_rows",
    },
)
