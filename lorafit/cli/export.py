"""`lorafit export`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Base, Debug, Json
from lorafit.operations import GGUF_TYPES
from lorafit.settings import OUTPUT


@app.command()
def export(
    place: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER|MODEL",
            help="A run's folder, any PEFT LoRA adapter, or a model, e.g. a merged one.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="The format: `gguf`. [dim]\\[gguf][/]",
            metavar="gguf",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = "gguf",
    model: Base = None,
    llama_cpp: Annotated[
        Optional[str],
        typer.Option(
            "--llama-cpp",
            help="llama.cpp's folder, which holds its converters. [dim]\\[$LLAMA_CPP, or on PATH][/]",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Optional[str],
        typer.Option(
            "--output",
            "-o",
            help="The file. [dim]\\[NAME.gguf][/]",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    outtype: Annotated[
        Optional[str],
        typer.Option(
            "--outtype",
            help="Type of the tensors. [dim]\\[the converter's][/]",
            metavar="|".join(GGUF_TYPES),
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the file, if it is a GGUF file.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = False,
    commands: Annotated[
        bool,
        typer.Option(
            "--commands",
            help="Show the converter's command without running it; llama.cpp need not be installed.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert an adapter or a model to GGUF with llama.cpp's own converter, and read the file back.

    An adapter stays one: llama.cpp loads it beside its base. Without llama.cpp the error names the command that gets it.
    """
    from lorafit.operations import export as run_export
    from lorafit.operations import prepare_export
    from lorafit.screen import Screen, show_conversion, show_export

    screen = Screen(json)
    conversion = prepare_export(
        place,
        to=to,
        model=model,
        output=output,
        outtype=outtype,
        llama_cpp=llama_cpp,
        overwrite=overwrite,
    )
    if commands:
        show_conversion(screen, conversion.download, conversion.command(), conversion.program is not None)
        return
    show_export(screen, run_export(conversion))
