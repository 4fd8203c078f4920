"""Comparing: many candidates over the same rows, measured; which one to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.compare.ahead import Ahead as Ahead
    from lorafit.compare.ahead import look_ahead as look_ahead
    from lorafit.compare.ahead import parse_duration as parse_duration
    from lorafit.compare.answer import Answer as Answer
    from lorafit.compare.answer import ChoiceRow as ChoiceRow
    from lorafit.compare.answer import answer_of as answer_of
    from lorafit.compare.answer import with_hint as with_hint
    from lorafit.compare.candidates import Candidate as Candidate
    from lorafit.compare.candidates import Impossible as Impossible
    from lorafit.compare.candidates import parse_count as parse_count
    from lorafit.compare.candidates import resolve_all as resolve_all
    from lorafit.compare.files import table_text as table_text
    from lorafit.compare.files import write_answer as write_answer
    from lorafit.compare.folder import CompareFolder as CompareFolder
    from lorafit.compare.folder import new_folder as new_folder
    from lorafit.compare.grid import from_file as from_file
    from lorafit.compare.grid import from_lists as from_lists
    from lorafit.compare.hint import Hint as Hint
    from lorafit.compare.page import VERDICTS as VERDICTS
    from lorafit.compare.ranking import rank as rank
    from lorafit.compare.request import Request as Request
    from lorafit.compare.request import full_settings as full_settings
    from lorafit.compare.results import Began as Began
    from lorafit.compare.results import Cut as Cut
    from lorafit.compare.results import Ended as Ended
    from lorafit.compare.run import Comparison as Comparison
    from lorafit.compare.run import Happening as Happening
    from lorafit.compare.shared import SharedBase as SharedBase
    from lorafit.compare.workers import check_workers as check_workers

__getattr__ = door(
    __name__,
    {
        "ahead": "Ahead look_ahead parse_duration",
        "answer": "Answer ChoiceRow answer_of with_hint",
        "candidates": "Candidate Impossible parse_count resolve_all",
        "folder": "CompareFolder new_folder",
        "files": "table_text write_answer",
        "grid": "from_file from_lists",
        "hint": "Hint",
        "page": "VERDICTS",
        "ranking": "rank",
        "request": "Request full_settings",
        "results": "Began Cut Ended",
        "run": "Comparison Happening",
        "shared": "SharedBase",
        "workers": "check_workers",
    },
)
