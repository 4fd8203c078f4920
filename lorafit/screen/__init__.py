"""All drawing on the terminal, a file per command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.screen.ascii import allow_ascii as allow_ascii
    from lorafit.screen.cache import show_caches as show_caches
    from lorafit.screen.cache import show_removed as show_removed
    from lorafit.screen.chat import ChatView as ChatView
    from lorafit.screen.compare import CompareView as CompareView
    from lorafit.screen.compare import show_ahead as show_ahead
    from lorafit.screen.compare import show_answer as show_answer
    from lorafit.screen.compare import show_candidates as show_candidates
    from lorafit.screen.compare import show_impossible as show_impossible
    from lorafit.screen.console import Screen as Screen
    from lorafit.screen.data import show_data as show_data
    from lorafit.screen.data import show_tokens as show_tokens
    from lorafit.screen.evaluate import show_eval as show_eval
    from lorafit.screen.export import show_conversion as show_conversion
    from lorafit.screen.export import show_export as show_export
    from lorafit.screen.help import show_topic as show_topic
    from lorafit.screen.help import show_topics as show_topics
    from lorafit.screen.inspect import show_map as show_map
    from lorafit.screen.merge import show_merge as show_merge
    from lorafit.screen.plan import show_header as show_header
    from lorafit.screen.plan import show_matrix as show_matrix
    from lorafit.screen.plan import show_plan as show_plan
    from lorafit.screen.presets import show_presets as show_presets
    from lorafit.screen.runs import show_runs as show_runs
    from lorafit.screen.train import TrainView as TrainView
    from lorafit.screen.train import show_train_report as show_train_report

__getattr__ = door(
    __name__,
    {
        "ascii": "allow_ascii",
        "cache": "show_caches show_removed",
        "compare": "CompareView show_ahead show_answer show_candidates show_impossible",
        "chat": "ChatView",
        "console": "Screen",
        "data": "show_data show_tokens",
        "evaluate": "show_eval",
        "export": "show_conversion show_export",
        "help": "show_topic show_topics",
        "inspect": "show_map",
        "merge": "show_merge",
        "plan": "show_header show_matrix show_plan",
        "presets": "show_presets",
        "runs": "show_runs",
        "train": "TrainView show_train_report",
    },
)
