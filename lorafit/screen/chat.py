"""`lorafit chat`: lines from a person or a pipe, answers as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress

from lorafit.errors import RequestError
from lorafit.screen.console import CONTROLS, Screen

PROMPT = "> "
SHOWN = {**CONTROLS, ord("\t"): "\t"}
HELP = (
    ("/base", "ask the base the last question; /base TEXT: another"),
    ("/reset", "forget the conversation"),
    ("/quit", "end; so does Ctrl-C or Ctrl-D here"),
)


class ChatView:
    """Reads lines from stdin, and writes answers to stdout, notes to stderr."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        # closed by the caller, `<&-`, it is None
        self.typed = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()  # by a person

    def loading(self, name: str) -> None:
        """What a person waits for."""
        if self.typed and not self.screen.as_json:
            self.screen.command("loading", name, answer=False)

    def start(self, about: str) -> None:
        self.screen.line("chat", about)
        if self.typed:
            self.screen.line("", "/base asks the base, /reset forgets, /quit ends; /help")

    def help(self) -> None:
        for name, what in HELP:
            self.screen.line(name, what)

    def lines(self) -> Iterator[str]:
        """The lines that are not blank, to the end of the input or Ctrl-C."""
        if self.typed:
            with suppress(ImportError):
                import readline  # noqa: F401  # input() takes its line editing and history
        number = 0
        with suppress(KeyboardInterrupt, EOFError):
            while sys.stdin is not None:
                number += 1
                try:
                    line = input(PROMPT) if self.typed else sys.stdin.readline()
                except UnicodeDecodeError as error:
                    raise RequestError(
                        f"line {number} of the input or one soon after it is not {error.encoding}",
                        "convert it first, e.g. with iconv -t utf-8",
                    ) from None
                if not line and not self.typed:
                    return
                if line.strip():
                    yield line.rstrip("\r\n")
        if self.typed:
            sys.stdout.write("\n")

    def answer(self, pieces: Iterator[str]) -> tuple[str, bool]:
        """(the answer, whether Ctrl-C ended it), written as it comes; not under `--json`."""
        said, stopped = "", False
        with closing(pieces):  # type: ignore[type-var]  # a generator
            try:
                for piece in pieces:
                    said += piece
                    self._write(piece)
            except KeyboardInterrupt:
                stopped = True
        self._write("\n")
        if stopped:
            self.screen.note("stopped")
        return said, stopped

    def _write(self, text: str) -> None:
        if not self.screen.as_json:
            sys.stdout.write(text.translate(SHOWN) if sys.stdout.isatty() else text)
            sys.stdout.flush()
