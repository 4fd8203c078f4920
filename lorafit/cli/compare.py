"""`lorafit compare`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Config, Debug, Json, Quiet, Verbose, run_options
from lorafit.cli.shell import stopping
from lorafit.errors import FAILED, RequestError
from lorafit.operations import COMPARES, bounds
from lorafit.settings import DATA, OUTPUT, TRAINING, WHAT

if TYPE_CHECKING:
    from lorafit.compare import Answer
    from lorafit.operations import Candidates, Compared
    from lorafit.screen import Screen


def _list(flag: str, help: str, panel: str) -> Any:
    return typer.Option(flag, help=help, metavar="LIST", rich_help_panel=panel, show_default=False)


def _flag(flag: str, help: str, panel: str) -> Any:
    return typer.Option(flag, help=help, rich_help_panel=panel, show_default=False)


def _text(flag: str, help: str, metavar: str, panel: str) -> Any:
    return typer.Option(flag, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


@app.command()
@run_options(*COMPARES)
def compare(
    flags: Mapping[str, Any],
    presets: Annotated[
        Optional[list[str]],
        _list("--presets", "Strategies, e.g. `basic,ffn,all`. [dim]\\[all of them][/]", WHAT),
    ] = None,
    layers: Annotated[
        Optional[list[str]],
        _list(
            "--layers",
            "Layers, e.g. `low,high,0-3`; `low+high` is one choice of both. [dim]\\[low,mid,high,all][/]",
            WHAT,
        ),
    ] = None,
    ranks: Annotated[
        Optional[list[str]], _list("--ranks", "LoRA ranks, e.g. `8,32`. [dim]\\[from the preset][/]", WHAT)
    ] = None,
    trainable: Annotated[
        Optional[str],
        _text(
            "--trainable", "Set each rank so that all train about as many parameters, e.g. `1M`.", "N", WHAT
        ),
    ] = None,
    grid: Annotated[
        Optional[str],
        _text("--grid", "A YAML file with a list of candidates, instead of lists.", "FILE", WHAT),
    ] = None,
    also: Annotated[
        Optional[list[str]],
        _text(
            "--also",
            "Text that the adapters should not change, to measure forgetting. Repeatable.",
            "FILE",
            DATA,
        ),
    ] = None,
    rates: Annotated[
        Optional[list[str]],
        _list(
            "--learning-rates",
            "Peak learning rates, e.g. `0.5x,1x,2x` of the derived one, or `1e-4`.",
            TRAINING,
        ),
    ] = None,
    seeds: Annotated[
        Optional[list[str]],
        _list("--seeds", "A number of seeds, e.g. `3`, or a list, e.g. `1,5`. [dim]\\[1][/]", TRAINING),
    ] = None,
    budget: Annotated[
        Optional[str],
        _text(
            "--budget",
            "Time for all of it, e.g. `10m`: all candidates take as many steps as fit.",
            "TIME",
            TRAINING,
        ),
    ] = None,
    halving: Annotated[
        bool,
        _flag(
            "--halving",
            "After 1/4 and again after 1/2 of the steps, drop the worse half, but for what is within noise of the rest.",
            TRAINING,
        ),
    ] = False,
    hint: Annotated[
        bool, _flag("--hint", "First rank the choices by the gradient at the start, as a hint.", TRAINING)
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            **bounds("workers"),
            help="Candidates to train at once on a CPU, each on one thread.",
            rich_help_panel=TRAINING,
        ),
    ] = 1,
    resume: Annotated[
        bool, _flag("--resume", "Go on with an unfinished comparison: `--resume DIR`.", OUTPUT)
    ] = False,
    dry: Annotated[
        bool, _flag("--plan", "Show the candidates and what they cost, and stop.", OUTPUT)
    ] = False,
    csv: Annotated[bool, _flag("--csv", "Print the table as CSV on stdout.", OUTPUT)] = False,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train many candidates on the same rows, and say which strategy and band to take.

    Base, rows and frozen layers are shared. Each candidate is a run folder of its own.
    """
    if csv and (json or dry):
        other = "--json" if json else "--plan"
        raise RequestError(
            f"--csv prints the results, and {other} a document of its own", "leave one of them out"
        )
    from lorafit.compare import Request, table_text
    from lorafit.operations import resolve_comparison
    from lorafit.screen import Screen, show_answer, show_candidates

    screen = Screen(json or csv, quiet, verbose)
    asked = Request(
        {name: value for name, value in flags.items() if name != "output"},
        presets=tuple(presets or ()), layers=tuple(layers or ()), ranks=tuple(ranks or ()),
        learning_rates=tuple(rates or ()), seeds=tuple(seeds or ()), grid=grid, config=config, budget=budget,
        trainable=trainable, also=tuple(also or ()), halving=halving, hint=hint,
    )  # fmt: skip
    target = Path(flags["output"]).expanduser() if "output" in flags else None
    prepared = _prepared(screen, resolve_comparison(asked, target, resume), workers)
    if dry:
        if json:
            screen.document({**prepared.ahead.as_json(), "impossible": prepared.of.impossible})
        else:
            show_candidates(screen, prepared.ahead)
        return
    answer = _answered(screen, prepared, resume)
    if json:
        screen.document(answer)
    elif csv:
        sys.stdout.write(table_text(answer))
    else:
        show_answer(screen, answer)
    if not answer.choices:
        raise typer.Exit(FAILED)


def _prepared(screen: Screen, of: Candidates, workers: int) -> Compared:
    """What will be compared, shown; its rows and its cost."""
    from lorafit.operations import check_peak, prepare_comparison
    from lorafit.screen import show_ahead, show_impossible

    show_impossible(screen, of.impossible)
    prepared = prepare_comparison(of, workers, screen.bar)
    show_ahead(screen, of.found, prepared.ahead, of.trainable, prepared.rows.look)
    if warning := check_peak(prepared.ahead):
        screen.note(warning)
    return prepared


def _answered(screen: Screen, run: Compared, resume: bool) -> Answer:
    """Run it to its end, on the screen; the answer."""
    from lorafit.compare import Answer
    from lorafit.operations import compare_events
    from lorafit.screen import CompareView

    view, answer = CompareView(screen, run.ahead), None
    with stopping() as stop:
        try:
            for event in compare_events(run, resume, stop):
                if isinstance(event, Answer):
                    answer = event
                else:
                    view.on(event)
        finally:
            view.close()
    assert answer is not None
    return answer
