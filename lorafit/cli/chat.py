"""`lorafit chat`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Optional

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
from lorafit.errors import RequestError
from lorafit.operations import bounds
from lorafit.settings import DATA, OPTIONS

if TYPE_CHECKING:
    from lorafit.evaluate import Chat
    from lorafit.screen import ChatView

PLAIN = {"prompt-completion", "text", "lines", "document", "tokens"}  # formats without turns


@app.command()
@run_options("template_args", "dtype", "quantize", "device")
def chat(
    flags: Mapping[str, Any],
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN|ADAPTER|MODEL",
            help="A run's folder, a PEFT LoRA adapter, or a model: a folder, a hub id, or `demo`.",
            show_default=False,
        ),
    ],
    system: Annotated[
        Optional[str],
        typer.Option(
            "--system", help="System message.", metavar="TEXT", rich_help_panel=GENERATION, show_default=False
        ),
    ] = None,
    temperature: Temperature = 0.0,
    seed: SamplingSeed = 0,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            **bounds("max_new_tokens"),
            help="Maximum new tokens of an answer.",
            rich_help_panel=GENERATION,
        ),
    ] = 512,
    plain: Annotated[
        Optional[bool],
        typer.Option(
            "--plain/--no-plain",
            help="Continue each line as plain text, without the chat template. [dim]\\[from the run's data][/]",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    model: Base = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk to a run, an adapter or a model; /base asks the base the same.

    Answers stream to stdout. With piped input, each line is one turn.
    """
    given = {option: OPTIONS[option].parsed(value) for option, value in flags.items()}

    from lorafit.screen import ChatView, Screen

    screen = Screen(json, quiet)
    view = ChatView(screen)
    drawn = (temperature, seed, max_new_tokens)
    talk, about, notes = _opened(given, name, model, system or "", drawn, plain, view.loading)
    view.start(about)
    for text in notes:
        screen.note(text)
    said: list[dict[str, Any]] = []
    try:
        for turn in _talk(view, talk):
            said.append(turn)
    finally:  # what was answered before a line that is refused, too
        if json:
            screen.document({"name": name, "turns": said})


def _opened(
    given: Mapping[str, Any],
    name: str,
    model: str | None,
    system: str,
    drawn: tuple[float, int, int],
    plain: bool | None,
    loading: Callable[[str], None] = lambda name: None,
) -> tuple[Chat, str, list[str]]:
    """(the conversation, what it is with, notes); `loading` is told the name before that takes its time.

    Raises RequestError for what cannot be talked to.
    """
    from lorafit.adapter import common_base, locate, named_alone, tokenizer_place
    from lorafit.model import chart_of, find
    from lorafit.operations import quantisation
    from lorafit.settings import settle
    from lorafit.system import without_collecting

    alone = named_alone(name, model)
    adapters = [] if alone else [locate(name)]
    loading(name)
    if alone:
        source = find(name)
        found = chart_of(source)
    else:
        source, found = common_base(adapters, model)
    if found.task == "masked":
        raise RequestError(
            f"`{found.model}` is a masked model: it fills masks and does not chat",
            f"lorafit eval {shlex.quote(name)} --prompt TEXT fills the masks of a text",
        )
    quantize, notes = quantisation(given, adapters, found)

    with without_collecting():
        from lorafit.adapter import attach, check_downloaded, left_in_base
        from lorafit.data import chat_template_of, prepare
        from lorafit.evaluate import Chat, Generator, Sampling, stored_settings
        from lorafit.forward import Forward
        from lorafit.model import load_model, load_tokenizer, pick_device, pick_dtype

    device = pick_device(given.get("device", "auto"))
    tokenizer = load_tokenizer(tokenizer_place(adapters[0], source.place) if adapters else source.place, name)
    prepare(tokenizer)
    settings = stored_settings(adapters[0], found) if adapters else settle({})[0]
    settings = replace(settings, template_args=given.get("template_args", settings.template_args))
    template = None
    if tokenizer.chat_template is not None and not (_trained_plain(adapters) if plain is None else plain):
        template = chat_template_of(tokenizer, settings)
    if template is None and (system or plain is False):
        needs = "--system needs" if system else "--no-plain needs"
        if tokenizer.chat_template is None:
            raise RequestError(
                f"{needs} a chat template, and `{name}` has none",
                "leave it out: each line is continued as it is",
            )
        raise RequestError(
            f"{needs} a chat template, and lines are continued as plain text", "add --no-plain"
        )
    loaded: Any = load_model(source, pick_dtype(given.get("dtype", "auto"), device), device, quantize)
    check_downloaded(adapters, source)
    forward = Forward.of(loaded, found.task)
    generator = Generator(tokenizer, forward, device, found.max_positions, Sampling(*drawn))
    loaded = attach(loaded, adapters[0]) if adapters else loaded
    what = f"{name} on {found.model}" if adapters else found.model
    how = f"temperature {drawn[0]:g}" if drawn[0] else "greedy"
    way = (
        "with its chat template" if template else r"each line is continued as plain text (\n is a line break)"
    )
    apart = left_in_base(adapters[0]) if adapters else ""
    talk = Chat(generator, loaded, template, bool(adapters), system, apart=apart)
    return talk, f"{what}, {how}, {way}", notes


def _trained_plain(adapters: list[str]) -> bool:
    """Whether a run was trained on plain text alone, so that it knows no turns."""
    from lorafit.adapter import run_of
    from lorafit.report import read_back

    run = read_back(run_of(adapters[0])) if adapters else None
    if run is None or run.settings.get("as_chat"):
        return False
    formats = {source["format"] for source in run.first("data").get("sources", ())}
    return bool(formats) and formats <= PLAIN


def _talk(view: ChatView, chat: Chat) -> Iterator[dict[str, Any]]:
    """The conversation, a line at a time: what was asked and answered, by which of the two."""
    for line in view.lines():
        command, _, text = line.strip().partition(" ")
        if command in ("/quit", "/exit", "/q"):
            return
        if command == "/reset":
            chat.forget()
            view.screen.note("the conversation is forgotten")
        elif command == "/help":
            view.help()
        elif command == "/base" and not chat.adapted:
            view.screen.note("there is no adapter: this is the base")
        elif command != "/base" and command.startswith("/") and not text and command.count("/") == 1:
            view.screen.note(f"there is no command {command}; /help lists them")
        else:
            base = command == "/base"
            asked = text.strip() if base else line
            asked = asked if chat.template else asked.replace("\\n", "\n")
            try:
                said, stopped = view.answer(chat.ask_base(asked) if base else chat.ask(asked))
            except RequestError as error:
                if not view.typed:
                    raise
                view.screen.error(error)
                continue
            if chat.forgotten:
                view.screen.note(f"{chat.forgotten} earlier turns no longer fit and were left out")
                chat.forgotten = 0
            yield {
                "prompt": asked or chat.asked,
                "answer": said,
                "of": "base" if base else _who(chat),
                "stopped": stopped,
            }


def _who(chat: Chat) -> str:
    return "adapter" if chat.adapted else "model"
