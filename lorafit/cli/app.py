"""The application that the commands belong to."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafit import __version__
from lorafit.cli.shell import Boundary

ABOUT = "LoRA fine-tuning in chosen modules of chosen layers: inspect, plan, train, evaluate, merge."
app = typer.Typer(
    name="lorafit",
    cls=Boundary,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=ABOUT,
    epilog="Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 and 143 interrupted. "
    "Topics: lorafit help.",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lorafit {__version__}")
        raise typer.Exit


@app.callback(help=ABOUT)
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version.", callback=_print_version, is_eager=True, show_default=False
        ),
    ] = False,
) -> None:
    """The options before a command."""
