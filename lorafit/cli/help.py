"""`lorafit help`: the documentation pages in lorafit/docs, by topic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lorafit.cli.app import app, command_name
from lorafit.cli.options import Debug, Json
from lorafit.errors import RequestError, closest

FOLDER = Path(__file__).resolve().parent.parent / "docs"

# the topics in the order of their list
TOPICS = (
    "presets", "data", "options", "memory-and-time", "frozen-layers", "large-models", "quantized", "speed", "distributed", "checkpoints",
    "trackers", "compare", "evidence", "evaluate", "merge", "python", "code",
)  # fmt: skip


@app.command(name="help")
def help_topic(
    topic: Annotated[
        Optional[str],
        typer.Argument(metavar="TOPIC", help="A topic; without one, they are listed.", show_default=False),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Read about a topic: data, presets, memory and time, checkpoints, and more."""
    from lorafit.screen import Screen, show_topic, show_topics

    screen = Screen(json)
    if topic is None:
        titles = {name: title_of(name) for name in TOPICS}
        if json:
            screen.document({"topics": titles})
        else:
            show_topics(screen, titles)
        return
    text = read_topic(topic)
    if json:
        screen.document({"topic": topic, "text": text})
    else:
        show_topic(screen, text)


def read_topic(name: str) -> str:
    """The Markdown of a topic. Raises RequestError for an unknown one, with the nearest."""
    if name not in TOPICS:
        commands = {command_name(command) for command in app.registered_commands}
        hint = f"lorafit {name} --help" if name in commands else closest(name, TOPICS)
        raise RequestError(f"there is no topic `{name}`", hint)
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def title_of(name: str) -> str:
    """The first line of a topic's page, without its mark."""
    return read_topic(name).partition("\n")[0].removeprefix("# ")
