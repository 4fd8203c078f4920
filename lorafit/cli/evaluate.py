"""`lorafit eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import (
    GENERATION,
    Base,
    Debug,
    Json,
    Quiet,
    SamplingSeed,
    Temperature,
    run_options,
)
from lorafit.operations import EVALUATES, bounds
from lorafit.settings import DATA, OUTPUT

BENCHMARKS = "Benchmarks"


@app.command(name="eval")
@run_options(*EVALUATES)
def evaluate(
    flags: Mapping[str, Any],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="A run's folder, or any PEFT LoRA adapter: a folder or a hub id; or one model, alone.",
            show_default=False,
        ),
    ],
    by: Annotated[
        Optional[str],
        typer.Option(
            "--by",
            help="Group results by a column, e.g. `topic`, or by `file`.",
            metavar="COLUMN",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    also: Annotated[
        Optional[list[str]],
        typer.Option(
            "--also",
            help="Text that the adapter should not change, to measure forgetting. Repeatable.",
            metavar="FILE",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            **bounds("samples"),
            help="Completions to show side by side.",
            rich_help_panel=GENERATION,
        ),
    ] = 3,
    prompt: Annotated[
        Optional[list[str]],
        typer.Option(
            "--prompt",
            help="A prompt of your own, answered by base and adapter; without --data, nothing else is run. Repeatable.",
            rich_help_panel=GENERATION,
            show_default=False,
        ),
    ] = None,
    temperature: Temperature = 0.0,
    seed: SamplingSeed = 0,
    max_new_tokens: Annotated[
        Optional[int],
        typer.Option(
            "--max-new-tokens",
            **bounds("max_new_tokens"),
            help="Maximum new tokens. [dim]\\[the reference's + 24, at most 256; 128 for --prompt][/]",
            rich_help_panel=GENERATION,
            show_default=False,
        ),
    ] = None,
    extremes: Annotated[
        int,
        typer.Option(
            "--rows",
            **bounds("rows"),
            help="Number of most improved, and most regressed, rows to show.",
            rich_help_panel=OUTPUT,
        ),
    ] = 2,
    tasks: Annotated[
        Optional[str],
        typer.Option(
            "--tasks",
            help="lm-eval tasks or task files, e.g. `hellaswag,mine.yaml`; without --data, only these are run.",
            metavar="NAMES",
            rich_help_panel=BENCHMARKS,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            **bounds("limit"),
            help="Maximum documents per task; 0 is all.",
            rich_help_panel=BENCHMARKS,
        ),
    ] = 0,
    model: Base = None,
    page: Annotated[
        Optional[str],
        typer.Option(
            "--report",
            help="Write the report page to this file. [dim]\\[report.html in the run's folder][/]",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare base and adapter on the same rows, with confidence intervals and sample outputs.

    Without --data, the rows that the run held out. Several adapters of one base may be compared. A model, e.g. a merged
    one, is scored alone.
    """
    from lorafit.operations import evaluate_adapters
    from lorafit.screen import Screen, show_eval

    screen = Screen(json, quiet)
    report = evaluate_adapters(
        adapters,
        flags,
        by=by,
        also=also,
        samples=samples,
        prompt=prompt,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        rows=extremes,
        tasks=tasks,
        limit=limit,
        model=model,
        report=page,
        bar=screen.bar,
    )
    if json:
        screen.document(report)
    else:
        show_eval(screen, report)
