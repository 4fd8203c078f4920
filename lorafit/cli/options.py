"""The options of the commands: those of a run are made from `RunConfig`'s fields, the common ones are here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Optional

import typer

from lorafit.operations import bounds
from lorafit.settings import DATA, OPTIONS, OUTPUT, Option

GENERATION = "Generation"

Body = Callable[..., None]


def run_options(*names: str) -> Callable[[Body], Body]:
    """Give a command these options of a run; `*` means all of them.

    The body gets the given options as its first argument, a mapping from names to the typed text; its own
    parameters follow.
    """
    chosen = list(OPTIONS) if names == ("*",) else list(names)

    def wrap(body: Body) -> Body:
        _, *own = inspect.signature(body, eval_str=True).parameters.values()
        made = [_parameter(OPTIONS[name]) for name in chosen]
        first = [p for p in made if p.name == "model"] + [p for p in own if _is_argument(p)]
        rest = [p for p in made if p.name != "model"] + [p for p in own if not _is_argument(p)]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*first, *rest)]

        @functools.wraps(body)
        def command(**values: Any) -> None:
            flags = {name: values.pop(name) for name in chosen}
            given: Mapping[str, Any] = {n: v for n, v in flags.items() if v is not None and v != []}
            body(given, **values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        del command.__wrapped__  # type: ignore[attr-defined]  # typer would read the body's own signature
        return command

    return wrap


def _is_argument(parameter: inspect.Parameter) -> bool:
    return any(type(m).__name__ == "ArgumentInfo" for m in getattr(parameter.annotation, "__metadata__", ()))


def _parameter(option: Option) -> inspect.Parameter:
    """An option of a run as a parameter that Typer reads: text, a list of texts, or a switch."""
    shown = shown_help(option)
    if option.name == "model":
        made = typer.Argument(help=shown, metavar="MODEL", show_default=False)
        annotation: Any = Annotated[Optional[str], made]
    elif isinstance(option.default, bool):
        flags = f"{option.flag}/--no-{option.flag[2:]}" if option.training else option.flag
        made = typer.Option(flags, help=shown, rich_help_panel=option.panel, show_default=False)
        annotation = Annotated[Optional[bool], made]
    else:
        names = [option.flag, *([option.short] if option.short else [])]
        made = typer.Option(
            *names, help=shown, rich_help_panel=option.panel, metavar=option.kind.metavar, show_default=False
        )
        annotation = Annotated[Optional[list[str]] if option.many else Optional[str], made]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def shown_help(option: Option) -> str:
    """The help of an option with its default, or what it is derived from."""
    text = option.help
    if option.kind.choices:
        text = f"{text.removesuffix('.')}: {', '.join(option.kind.choices)}."
    if option.derived:
        return f"{text} [dim]\\[from {option.derived}][/]"
    if option.default is None or option.default == () or isinstance(option.default, bool):
        return text
    return f"{text} [dim]\\[{option.default}][/]"


def _option(*flags: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, show_default=False, **more)


Base = Annotated[
    Optional[str],
    _option(
        "--model",
        help="Base model, if it is not the one that the adapter names.",
        panel=DATA,
        metavar="MODEL",
    ),
]
Config = Annotated[
    Optional[str],
    _option("--config", help="A run file, e.g. `run.yaml`; flags override it.", panel=OUTPUT, metavar="FILE"),
]
Push = Annotated[
    Optional[str],
    _option(
        "--push-to-hub",
        help="Push the result to the Hub; a new repository is private.",
        panel=OUTPUT,
        metavar="OWNER/NAME",
    ),
]
Json = Annotated[bool, _option("--json", help="Print one JSON document on stdout.", panel=OUTPUT)]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        **bounds("temperature"),
        help="Sampling temperature; 0 is greedy.",
        rich_help_panel=GENERATION,
    ),
]
SamplingSeed = Annotated[
    int, typer.Option("--seed", **bounds("seed"), help="Sampling seed.", rich_help_panel=GENERATION)
]
Verbose = Annotated[
    bool,
    _option("--verbose", "-v", help="Show rows of the data, lengths, reasons and all notes.", panel=OUTPUT),
]
Quiet = Annotated[bool, _option("--quiet", "-q", help="Hide progress and notes.", panel=OUTPUT)]


def _set_debug(value: bool) -> None:
    from lorafit.cli import shell

    shell.debug = value


Debug = Annotated[
    bool, _option("--debug", help="Show the traceback of an error.", panel=OUTPUT, callback=_set_debug)
]
