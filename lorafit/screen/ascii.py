"""Output that cannot hold every character, e.g. with LC_ALL=C: lines and signs become ASCII, nothing fails."""

from __future__ import annotations

import codecs
from contextlib import suppress
from typing import Any

ASCII = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "×": "x", "·": "-", "→": "->", "±": "+-", "…": "...", "│": "|", "┃": "#", "─": "-",
     "┌": "+", "┐": "+", "└": "+", "┘": "+", "■": "#", "⏎": "\\n", "•": "-", "━": "-", "╸": "-", "╺": "-"}
)  # fmt: skip


def allow_ascii(stream: Any) -> None:
    """Have a text stream whose encoding is not Unicode write what stands for other characters in ASCII."""
    if not is_unicode(stream):
        with suppress(AttributeError, ValueError, OSError):  # a stream that cannot be reconfigured
            stream.reconfigure(errors="lorafit-ascii")


def is_unicode(stream: Any) -> bool:
    """Whether a stream can hold every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(ASCII)
    return "".join(c if ord(c) < 128 else "?" for c in text), error.end


codecs.register_error("lorafit-ascii", _in_ascii)
