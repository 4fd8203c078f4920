"""`lorafit merge`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Base, Debug, Json, Push, Quiet, run_options
from lorafit.cli.push import push_folder
from lorafit.operations import MERGED_DTYPES, MERGES
from lorafit.settings import OUTPUT, WHAT


@app.command()
@run_options(*MERGES)
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
            help="Folder for the merged model (required).",
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
            metavar="|".join(MERGED_DTYPES),
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
    from lorafit.operations import merge_named
    from lorafit.report import uses_of_merged
    from lorafit.screen import Screen, show_merge

    if push_to_hub:
        from lorafit import hub

        hub.check(push_to_hub)
    screen = Screen(json, quiet)
    report, found = merge_named(
        run,
        flags,
        adapter=adapter,
        model=model,
        output=output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        bar=screen.bar,
    )
    if json:
        screen.document(report)
    else:
        show_merge(screen, report, uses_of_merged(found.family, found.task, report.output, found.model))
    if push_to_hub:
        push_folder(screen, report.output, push_to_hub)
