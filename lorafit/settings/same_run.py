"""Which settings make a run the same one: what `--resume` compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafit.jsonio import jsonable
from lorafit.settings.run_config import OPTIONS, RunConfig

# Options that may differ when a run is resumed: how it is run, saved and watched. The rows have a digest.
MAY_CHANGE = {
    "device", "shard", "gradient_checkpointing", "compile", "prefix_cache", "prefix_residency", "head_chunk", "save_steps", "save_minutes",
    "keep", "eval_steps", "patience", "min_delta", "keep_last", "sample", "output", "overwrite", "resume", "track",
    "track_project", "track_name",
}  # fmt: skip
# What the digests of rows and modules stand for.
IN_DIGESTS = {
    "modules", "include", "exclude", "stack", "strict", "data", "eval_data", "holdout", "format", "map", "chat_template",
    "loss_on", "overflow",
}  # fmt: skip


def changed_settings(config: RunConfig, recorded: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(option, what it was, what it is) of each option with a value that a finished run had otherwise.

    `recorded` is the run's file. What is derived later is not compared.
    """
    now = config.as_file()
    found = []
    for name, option in OPTIONS.items():
        value = now.get(name)
        if name in MAY_CHANGE or not option.kept or (value is None and option.derived):
            continue
        was = recorded.get(name, jsonable(option.default))
        if was != value:
            found.append((name, was, value))
    return found
