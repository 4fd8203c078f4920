"""What the commands do, without the command line and the screen; `lorafit.train(…)` in Python is the same code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.operations.evaluating import evaluate_adapters as evaluate_adapters
    from lorafit.operations.evaluating import quantisation as quantisation
    from lorafit.operations.merging import merge_named as merge_named
    from lorafit.operations.options import EVALUATES as EVALUATES
    from lorafit.operations.options import MERGED_DTYPES as MERGED_DTYPES
    from lorafit.operations.options import MERGES as MERGES
    from lorafit.operations.options import PLANS as PLANS
    from lorafit.operations.options import TRAINS as TRAINS
    from lorafit.operations.other_tools import ours as ours
    from lorafit.operations.planning import Planned as Planned
    from lorafit.operations.planning import plan_matrix as plan_matrix
    from lorafit.operations.planning import plan_run as plan_run
    from lorafit.operations.progress import Bar as Bar
    from lorafit.operations.progress import no_bar as no_bar
    from lorafit.operations.resume import by_folder as by_folder
    from lorafit.operations.training import Finished as Finished
    from lorafit.operations.training import Prepared as Prepared
    from lorafit.operations.training import Resolved as Resolved
    from lorafit.operations.training import check_memory as check_memory
    from lorafit.operations.training import prepare_run as prepare_run
    from lorafit.operations.training import resolve_run as resolve_run
    from lorafit.operations.training import train_events as train_events

__getattr__ = door(
    __name__,
    {
        "evaluating": "evaluate_adapters quantisation",
        "merging": "merge_named",
        "options": "EVALUATES MERGED_DTYPES MERGES PLANS TRAINS",
        "other_tools": "ours",
        "planning": "Planned plan_matrix plan_run",
        "progress": "Bar no_bar",
        "resume": "by_folder",
        "training": "Finished Prepared Resolved check_memory prepare_run resolve_run train_events",
    },
)
