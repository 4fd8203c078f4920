"""Where an answer ends: the tokens that end a turn, worked out from the chat template and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.data.template import SENTINEL, ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"

CALL = {
    "id": "callabcde", "type": "function",
    "function": {"name": "find", "arguments": {"what": SENTINEL}},
}  # fmt: skip


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids at which generation stops: the tokenizer's end token, and what the chat template writes behind
    an answer and behind a tool call."""
    found = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    if tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer)
        asked = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": SENTINEL}
        call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        for last in (answer, call):
            text = template.probe([asked, last])
            if text is None or SENTINEL not in text:
                continue
            if last is call and not template.names_tools:
                continue
            end = template.end_behind(text, text.rindex(SENTINEL) + len(SENTINEL), len(text))
            token = template.last_special(text[:end]) if end else None
            if token is not None:
                number: Any = tokenizer.convert_tokens_to_ids(token)
                found.add(int(number))
    return tuple(sorted(found))


def write_generation_config(folder: Path, *places: Path, ends: Iterable[int] = ()) -> None:
    """Write `generation_config.json` into a folder: what those of `places` say, the later over the earlier,
    and one list of all the end tokens that they name, and of `ends`. Nothing where no end token is known.
    """
    found: dict[str, Any] = {}
    every: dict[int, None] = {}
    for place in places:
        known = _read(place / GENERATION)
        stated = known.get("eos_token_id")
        every |= dict.fromkeys(
            end for end in (stated if isinstance(stated, list) else [stated]) if isinstance(end, int)
        )
        found |= known
    every |= dict.fromkeys(ends)
    if every:
        found["eos_token_id"] = list(every) if len(every) > 1 else next(iter(every))
        (folder / GENERATION).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
