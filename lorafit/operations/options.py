"""Which options of a run each operation takes."""

from __future__ import annotations

from lorafit.settings import OPTIONS

NOT_PLANNED = (
    "output", "overwrite", "resume", "save_steps", "save_minutes", "keep", "eval_steps", "patience", "min_delta",
    "keep_last", "sample",
)  # fmt: skip
PLANS: tuple[str, ...] = tuple(name for name in OPTIONS if name not in NOT_PLANNED)
TRAINS: tuple[str, ...] = tuple(OPTIONS)

NOT_COMPARED = (
    "preset", "layers", "modules", "rank", "learning_rate", "seed", "from_adapter", "overwrite", "resume", "sample",
    "track", "track_project", "track_name", "prefix_residency",
)  # fmt: skip
COMPARES: tuple[str, ...] = tuple(name for name in OPTIONS if name not in NOT_COMPARED)

# of the run's own files, not of others
SHAPE: tuple[str, ...] = ("format", "map", "on_bad_row", "csv_delimiter", "csv_quote")
ABOUT_DATA: tuple[str, ...] = (*SHAPE, "as_chat", "loss_on", "overflow", "max_length")
EVALUATES: tuple[str, ...] = (
    "data",
    *ABOUT_DATA,
    "batch_size",
    "dtype",
    "quantize",
    "device",
    "prefix_residency",
)
MERGES: tuple[str, ...] = ("overwrite",)
MERGED_DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")  # that `merge` writes
