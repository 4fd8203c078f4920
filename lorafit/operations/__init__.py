"""What the commands do, without the command line and the screen; `lorafit.train(…)` in Python is the same code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.operations.comparing import Candidates as Candidates
    from lorafit.operations.comparing import Compared as Compared
    from lorafit.operations.comparing import check_peak as check_peak
    from lorafit.operations.comparing import compare_events as compare_events
    from lorafit.operations.comparing import prepare_comparison as prepare_comparison
    from lorafit.operations.comparing import resolve_comparison as resolve_comparison
    from lorafit.operations.evaluating import evaluate_adapters as evaluate_adapters
    from lorafit.operations.evaluating import quantisation as quantisation
    from lorafit.operations.exporting import Conversion as Conversion
    from lorafit.operations.exporting import export as export
    from lorafit.operations.exporting import prepare_export as prepare_export
    from lorafit.operations.merging import merge_named as merge_named
    from lorafit.operations.options import COMPARES as COMPARES
    from lorafit.operations.options import EVALUATES as EVALUATES
    from lorafit.operations.options import GGUF_TYPES as GGUF_TYPES
    from lorafit.operations.options import MERGED_DTYPES as MERGED_DTYPES
    from lorafit.operations.options import MERGES as MERGES
    from lorafit.operations.options import PLANS as PLANS
    from lorafit.operations.options import TRAINS as TRAINS
    from lorafit.operations.options import bounds as bounds
    from lorafit.operations.options import check_own as check_own
    from lorafit.operations.other_tools import ours as ours
    from lorafit.operations.planning import Planned as Planned
    from lorafit.operations.planning import plan_matrix as plan_matrix
    from lorafit.operations.planning import plan_run as plan_run
    from lorafit.operations.planning import train_command as train_command
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
        "comparing": "Candidates Compared check_peak compare_events prepare_comparison resolve_comparison",
        "evaluating": "evaluate_adapters quantisation",
        "exporting": "Conversion export prepare_export",
        "merging": "merge_named",
        "options": "COMPARES EVALUATES GGUF_TYPES MERGED_DTYPES MERGES PLANS TRAINS bounds check_own",
        "other_tools": "ours",
        "planning": "Planned plan_matrix plan_run train_command",
        "progress": "Bar no_bar",
        "resume": "by_folder",
        "training": "Finished Prepared Resolved check_memory prepare_run resolve_run train_events",
    },
)
