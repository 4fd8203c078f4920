"""What a chat template leaves out of a row: a turn, a thought, a tool call, the tools. And tool arguments in
the form that the template writes as JSON once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafit.data.messages import REASONING, as_object
from lorafit.data.template import (
    SENTINEL,
    ChatTemplate,
    Message,
    Span,
    call_texts,
)
from lorafit.errors import RequestError

THOUGHT_ENDS = ("</think>", "[/THINK]", "</thinking>", "</reasoning>")


@dataclass(slots=True)
class LeftOut:
    """What a template leaves out. What follows from the shape of a conversation alone is found once a shape."""

    template: ChatTemplate
    _shapes: dict[Any, bool] = field(default_factory=dict)

    def find(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any],
        whole: str,
        spans: dict[int, Span],
        where: str,
    ) -> Iterator[tuple[str, str]]:
        """(what it is, its text) of each part of a row that its rendering does not hold.

        Raises RequestError where an answer would be learned without anything that the assistant says.
        """
        for number, turn in enumerate(messages):
            start, stop = spans.get(number, (0, len(whole)))
            parts = list(_parts(turn))
            gone = []
            for kind, text in parts:
                if not self._holds(messages, tools, number, kind, text, whole[start:stop]):
                    gone.append((kind, text))
            if number in spans and parts and len(gone) == len(parts):
                raise RequestError(
                    f"`{where}`: the chat template leaves out {gone[0][0]} of message {number + 1}, "
                    "so its answer would be learned empty",
                    "--chat-template names another template",
                )
            yield from dict(reversed(gone)).items()  # the first of each kind
        if tools and not self._holds_tools(messages, tools, whole):
            yield "the tools", ", ".join(filter(None, map(_tool_name, tools)))

    def _holds(
        self, messages: Sequence[Message], tools: Sequence[Any], number: int, kind: str, text: str, part: str
    ) -> bool:
        if not _stands_in(text, part):
            return False
        if len(text) >= 24 or kind in ("a thought", "a tool call"):
            return True
        # a short text may stand there by chance, in a header or in another turn
        shape = tuple((turn["role"], *sorted(turn)) for turn in messages), bool(tools), number, kind
        if shape not in self._shapes:
            altered = [*messages]
            altered[number] = {**messages[number], "content": SENTINEL}
            found = self.template.probe(altered, tools)
            self._shapes[shape] = found is None or SENTINEL in found
        return self._shapes[shape]

    def _holds_tools(self, messages: Sequence[Message], tools: Sequence[Any], whole: str) -> bool:
        if not all(_stands_in(name, whole) for tool in tools if (name := _tool_name(tool))):
            return False
        shape = tuple((turn["role"], *sorted(turn)) for turn in messages), "tools"
        if shape not in self._shapes:
            self._shapes[shape] = self.template.probe(messages) != whole
        return self._shapes[shape]


def _parts(turn: Message) -> Iterator[tuple[str, str]]:
    """(what it is, its text) of all that a message says."""
    role = turn["role"]
    said = turn.get("content") or ""
    for mark in THOUGHT_ENDS:
        if role == "assistant" and mark in said:
            thought, _, said = said.rpartition(mark)
            thought = thought.strip().removeprefix(mark.replace("/", "")).strip()
            if thought:
                yield "a thought", thought
    if said.strip():
        yield ("an answer" if role == "assistant" else f"a `{role}` turn"), said.strip()
    for key in REASONING:
        if isinstance(turn.get(key), str) and turn[key].strip():
            yield "a thought", turn[key].strip()
            break
    for call in turn.get("tool_calls") or ():
        for text in call_texts(call):
            yield "a tool call", text


def _stands_in(text: str, whole: str) -> bool:
    """Whether a text stands in another: as it is, as JSON, or with other white space."""
    if text in whole:
        return True
    for ascii_only in (False, True):
        if json.dumps(text, ensure_ascii=ascii_only)[1:-1] in whole:
            return True
    return " ".join(text.split()) in " ".join(whole.split())


def _tool_name(tool: Any) -> str:
    inner = tool.get("function", tool) if isinstance(tool, dict) else {}
    return str(inner.get("name") or "") if isinstance(inner, dict) else ""


# -- tool arguments


def fit_arguments(template: ChatTemplate, messages: list[Message], tools: Sequence[Any]) -> list[Message]:
    """The messages with their tool arguments as the template writes them: an object, or JSON text.

    Both are tried; the one is taken whose rendering holds the arguments as JSON, once encoded.
    """
    if not any(turn.get("tool_calls") for turn in messages):
        return messages
    rendered = []
    for form in (as_object, _as_text):
        made = _with_arguments(messages, form)
        text = template.probe(made, tools)
        if text is not None:
            if _encoded_once(made, text, quoted=True):
                return made
            rendered.append((made, text))
    # a template of another syntax, as `<parameter=city>`
    return next((made for made, text in rendered if _encoded_once(made, text, quoted=False)), messages)


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_arguments(messages: Sequence[Message], form: Any) -> list[Message]:
    made = []
    for turn in messages:
        calls = turn.get("tool_calls")
        if isinstance(calls, list):
            turn = {**turn, "tool_calls": [_call_with(call, form) for call in calls]}
        made.append(turn)
    return made


def _call_with(call: Any, form: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call


def _encoded_once(messages: Sequence[Message], text: str, quoted: bool) -> bool:
    """Whether the arguments of every call stand in the text, their names `quoted` or anyhow, but never with
    escaped quotes."""
    for turn in messages:
        for call in turn.get("tool_calls") or ():
            inner = call.get("function", call) if isinstance(call, dict) else {}
            arguments = as_object(inner.get("arguments"))
            for key in arguments if isinstance(arguments, dict) else ():
                name = json.dumps(str(key), ensure_ascii=False)
                if (name if quoted else str(key)) not in text or json.dumps(name)[1:-1] in text:
                    return False
    return True
