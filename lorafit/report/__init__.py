"""A finished run: its folder read back, its report page and its model card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.report.elsewhere import Adapted as Adapted
    from lorafit.report.elsewhere import Use as Use
    from lorafit.report.elsewhere import uses_of_adapter as uses_of_adapter
    from lorafit.report.elsewhere import uses_of_merged as uses_of_merged
    from lorafit.report.elsewhere import why_not_gguf as why_not_gguf
    from lorafit.report.elsewhere import why_not_merged_gguf as why_not_merged_gguf
    from lorafit.report.html import PAGE_MARK as PAGE_MARK
    from lorafit.report.html import document as document
    from lorafit.report.html import make_page as make_page
    from lorafit.report.html import write_page as write_page
    from lorafit.report.listing import RunRow as RunRow
    from lorafit.report.listing import find_runs as find_runs
    from lorafit.report.listing import runs_text as runs_text
    from lorafit.report.listing import sorted_by as sorted_by
    from lorafit.report.markup import Html as Html
    from lorafit.report.markup import el as el
    from lorafit.report.markup import table as table
    from lorafit.report.model_card import adapter_card as adapter_card
    from lorafit.report.model_card import merged_card as merged_card
    from lorafit.report.run import DAMAGED as DAMAGED
    from lorafit.report.run import Run as Run
    from lorafit.report.run import name_without as name_without
    from lorafit.report.run import read_back as read_back
    from lorafit.report.run import steps_text as steps_text
    from lorafit.report.svg import COLOURS as COLOURS
    from lorafit.report.svg import Curve as Curve
    from lorafit.report.svg import chart as chart
    from lorafit.report.svg import scatter as scatter
    from lorafit.report.svg import series as series
    from lorafit.report.svg import thinned as thinned

__getattr__ = door(
    __name__,
    {
        "html": "PAGE_MARK document make_page write_page",
        "elsewhere": "Adapted Use uses_of_adapter uses_of_merged why_not_gguf why_not_merged_gguf",
        "listing": "RunRow find_runs runs_text sorted_by",
        "markup": "Html el table",
        "model_card": "adapter_card merged_card",
        "svg": "COLOURS Curve chart scatter series thinned",
        "run": "DAMAGED Run name_without read_back steps_text",
    },
)
