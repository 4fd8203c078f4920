"""`lorafit merge`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Base, Debug, Json, Push, Quiet, run_options
from lorafit.cli.push import push_folder
from lorafit.errors import RequestError
from lorafit.outputs import last_run
from lorafit.settings import OPTIONS, OUTPUT, WHAT

DTYPES = ("float32", "bfloat16", "float16")


@app.command()
@run_options("overwrite")
def merge(
    flags: Mapping[str, Any],
    run: Annotated[
        Optional[str],
        typer.Argument(
            metavar="ADAPTER",
            help="A run's folder, or any PEFT LoRA adapter: a folder or a hub id.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Optional[list[str]],
        typer.Option(
            "--adapter",
            help="Another adapter, as PATH or PATH=WEIGHT; the weighted sum is merged. Repeatable.",
            metavar="PATH",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    model: Base = None,
    output: Annotated[
        Optional[str],
        typer.Option(
            "--output",
            "-o",
            help="Folder for the merged model; it must be named.",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Optional[str],
        typer.Option(
            "--dtype",
            help="Output dtype. [dim]\\[the base's][/]",
            metavar="|".join(DTYPES),
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        Optional[str],
        typer.Option(
            "--max-shard-size",
            help="Maximum shard size, e.g. `5GB`. [dim]\\[the base's files][/]",
            metavar="SIZE",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Verify the result against base + adapter.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = True,
    push_to_hub: Push = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge adapters into the base; streams tensors and verifies the result."""
    given = {name: OPTIONS[name].parsed(value) for name, value in flags.items()}

    from lorafit.adapter import common_base, locate, tokenizer_place
    from lorafit.report import uses_of_merged
    from lorafit.screen import Screen, show_merge
    from lorafit.system import without_collecting
    from lorafit.units import bytes_text, parse_bytes

    named = [*([(run, 1.0)] if run else []), *map(_weighed, adapter or [])]
    named = [(locate(path), weight) for path, weight in named]
    if not named:
        raise RequestError(
            "merge needs an adapter", f"lorafit merge {shlex.quote(last_run() or 'RUN')} -o DIR"
        )
    first = named[0][0]
    if not output:
        raise RequestError("merge needs an output folder", f"lorafit merge {shlex.quote(first)} -o DIR")
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"--dtype is `{dtype}`: it takes one of {', '.join(DTYPES)}")
    try:
        limit = parse_bytes(max_shard_size) if max_shard_size else 0
    except ValueError as error:
        raise RequestError(f"--max-shard-size is `{error}`: it takes a size", "e.g. 5GB") from None
    if push_to_hub:
        from lorafit import hub

        hub.check(push_to_hub)
    screen = Screen(json, quiet)
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
    with screen.bar("merging", bytes_text) as tick:
        report = merge_adapters(
            adapters, source, found, settings, rows if rows is not None else (), tokenizer, tick
        )
    if json:
        screen.document(report)
    else:
        show_merge(screen, report, uses_of_merged(found.family, found.task, report.output, found.model))
    if push_to_hub:
        push_folder(screen, report.output, push_to_hub)


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
