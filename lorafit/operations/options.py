"""Which options of a run each operation takes."""

from __future__ import annotations

from math import inf
from typing import Any

from lorafit.errors import RequestError
from lorafit.settings import OPTIONS

NOT_PLANNED = (
    "output", "overwrite", "resume", "save_steps", "save_minutes", "keep", "eval_steps", "patience", "min_delta",
    "keep_last", "sample",
)  # fmt: skip
PLANS: tuple[str, ...] = tuple(name for name in OPTIONS if name not in NOT_PLANNED)
TRAINS: tuple[str, ...] = tuple(OPTIONS)

NOT_COMPARED = (
    "preset", "layers", "modules", "rank", "learning_rate", "seed", "from_adapter", "overwrite", "resume", "sample",
    "track", "track_project", "track_name", "shard", "compile",
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

GGUF_TYPES: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0", "auto")  # that llama.cpp's converters write

# The numbers that options of the commands' own take: the least and the most.
NUMBERS: dict[str, tuple[int, int | None]] = {
    "processes": (1, None),
    "workers": (1, 64),
    "samples": (0, 50),
    "temperature": (0, 10),
    "seed": (0, 2**31),
    "max_new_tokens": (1, None),
    "rows": (0, 50),
    "limit": (0, None),
}


def bounds(name: str) -> dict[str, Any]:
    """The bounds of a number, as the command line declares them."""
    least, most = NUMBERS[name]
    return {"min": least, "max": most}


def check_own(name: str, value: Any, default: Any) -> None:
    """Raises RequestError for a value that an option of a command's own does not take: a number out of bounds or of
    another kind, something else than true or false for a switch."""
    if name in NUMBERS:
        least, most = NUMBERS[name]
        kinds, takes = (
            ((int, float), "a number") if isinstance(default, float) else ((int,), "a whole number")
        )
        takes += f" from {least} on" + ("" if most is None else f", at most {most}")
        right = isinstance(value, kinds) and not isinstance(value, bool)
        right = right and least <= value <= (inf if most is None else most)
    elif isinstance(default, bool):
        right, takes = isinstance(value, bool), "True or False"
    else:
        return
    if not right:
        raise RequestError(f"`{name}` is {value!r}: it takes {takes}")
