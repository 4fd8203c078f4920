"""Adapters merged into their base."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.adapter import common_base, locate, tokenizer_place
from lorafit.errors import RequestError
from lorafit.operations.options import MERGED_DTYPES
from lorafit.operations.progress import Bar, no_bar
from lorafit.outputs import last_run
from lorafit.settings import OPTIONS
from lorafit.system import without_collecting
from lorafit.units import bytes_text, parse_bytes

if TYPE_CHECKING:
    from lorafit.model import ModelMap
    from lorafit.results import MergeReport


def merge_named(
    run: str | None,
    flags: Mapping[str, Any],
    *,
    adapter: Sequence[str] | None = None,
    model: str | None = None,
    output: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    verify: bool = True,
    bar: Bar = no_bar,
) -> tuple[MergeReport, ModelMap]:
    """Merge adapters into their base and verify the result: (the report, the base's map).

    The arguments are those of `lorafit merge`. Raises RequestError for what cannot be merged, RunError where the
    result does not verify.
    """
    given = {name: OPTIONS[name].parsed(value) for name, value in flags.items()}
    named = [*([(run, 1.0)] if run else []), *map(_weighed, adapter or [])]
    named = [(locate(path), weight) for path, weight in named]
    if not named:
        raise RequestError(
            "merge needs an adapter", f"lorafit merge {shlex.quote(last_run() or 'RUN')} -o DIR"
        )
    first = named[0][0]
    if not output:
        raise RequestError("merge needs an output folder", f"lorafit merge {shlex.quote(first)} -o DIR")
    if dtype is not None and dtype not in MERGED_DTYPES:
        raise RequestError(f"--dtype is `{dtype}`: it takes one of {', '.join(MERGED_DTYPES)}")
    try:
        limit = parse_bytes(max_shard_size) if max_shard_size else 0
    except ValueError as error:
        raise RequestError(f"--max-shard-size is `{error}`: it takes a size", "e.g. 5GB") from None
    source, found = common_base([path for path, _ in named], model)

    with without_collecting():
        from lorafit.evaluate import held_out_rows
        from lorafit.merge import MergeSettings, merge_adapters
        from lorafit.model import load_tokenizer

    tokenizer, rows = None, None
    if verify:
        tokenizer = load_tokenizer(tokenizer_place(first, source.place), first)
        # without the run's data, the verification uses built-in texts
        with suppress(RequestError):
            rows = held_out_rows(first, tokenizer, found)
    settings = MergeSettings(
        Path(output).expanduser(), given.get("overwrite", False), dtype or "", limit, verify
    )
    adapters = [(Path(path).expanduser(), weight) for path, weight in named]
    with bar("merging", bytes_text) as tick:
        report = merge_adapters(
            adapters, source, found, settings, rows if rows is not None else (), tokenizer, tick
        )
    return report, found


def _weighed(text: str) -> tuple[str, float]:
    """`PATH=WEIGHT`, or `PATH` alone for a weight of 1. Raises RequestError if the weight is not a number."""
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    with suppress(ValueError):
        value = float(weight)
        if path and math.isfinite(value):
            return path, value
    raise RequestError(f"`--adapter {text}` has no number after the =", "e.g. runs/a=0.5")
