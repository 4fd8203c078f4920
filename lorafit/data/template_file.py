"""A chat template in a file: read, and parsed once."""

from __future__ import annotations

import re
from pathlib import Path

from lorafit.errors import RequestError

GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
LARGEST_TEMPLATE = 1_000_000  # bytes


def read_template(path: str) -> str:
    """The chat template in a file. Raises RequestError where it cannot be read, or is no template."""
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > LARGEST_TEMPLATE:
            raise RequestError(f"--chat-template `{path}` is larger than {LARGEST_TEMPLATE:,} bytes")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read --chat-template `{path}`: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"--chat-template `{path}` is not UTF-8", "save the file as UTF-8") from None
    if not text.strip():
        raise RequestError(f"--chat-template `{path}` is empty")
    from jinja2 import Environment, TemplateSyntaxError

    try:
        # the tags of transformers' own, which jinja does not know, and `break` and `continue`
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_TAG.sub("", text))
    except TemplateSyntaxError as error:
        raise RequestError(
            f"--chat-template `{path}:{error.lineno}` is not a valid template: {error.message}",
            "it is a Jinja template, as in a tokenizer's chat_template.jinja",
        ) from None
    return text
