"""Messages as people write them to messages as chat templates read them: roles, parts, tool calls, weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from lorafit.errors import RequestError, closest

Message = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message that hold a thought

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "bard": "assistant", "bing": "assistant", "ai": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "function": "tool", "ipython": "tool", "function_call": "function_call",
    "tool_call": "function_call",
}  # fmt: skip

# Roles that people write for any chat template, which may write them as they are.
ROLES = frozenset({*SPEAKERS, "developer", "environment", "document", "context"})
KNOWN_ROLES = "roles are `system`, `user`, `assistant`, `tool`, and those that the chat template names"

WEIGHTS = (
    "weight",
    "train",
    "trainable",
    "loss",
    "loss_weight",
    "learn",
)  # of a turn: what it counts in the loss; false is 0
ROW_WEIGHTS = ("loss_weight", "weight", "train", "trainable")
KEPT_NULLS = (
    "default",
    "const",
    "enum",
    "arguments",
    "parameters",
)  # in JSON their nulls were written by a person


def kind_of(value: Any) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", bool: "true or false", str: "a string"}
    return names.get(type(value), "a number")


def from_text(value: Any, where: str, key: str) -> Any:
    """A list that is written as JSON text, as columns of a table are."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"`{where}`: `{key}` is not valid JSON: {error}") from None


def without_nulls(value: Any, kept: Iterable[str] = ()) -> Any:
    """The value less the keys that hold null, all the way down, but for what lies under the `kept` keys."""
    if isinstance(value, dict):
        return {
            key: item if key in kept else without_nulls(item, kept)
            for key, item in value.items()
            if item is not None or key in kept or key == "content"
        }
    if isinstance(value, (list, tuple)):
        return [without_nulls(item, kept) for item in value]
    return value


def messages_of(
    value: Any, key: str, where: str, ends: bool = True, kept_nulls: Iterable[str] = KEPT_NULLS
) -> tuple[Message, ...]:
    """A list of messages, in any of the shapes that people use: OpenAI's `role` and `content`, ShareGPT's
    `from` and `value`, columns of lists, JSON text.

    `ends` asks for an assistant among them. Raises RequestError with the row's place.
    """
    value = _in_rows(from_text(value, where, key))
    if not isinstance(value, list) or not value:
        raise RequestError(f"`{where}`: `{key}` is not a list of messages")
    found = [_message(turn, key, where, kept_nulls) for turn in value]
    if ends and not any(turn["role"] == "assistant" for turn in found):
        strange = next((turn["role"] for turn in found if turn["role"] not in ROLES), None)
        raise RequestError(
            f"`{where}`: no assistant message in `{key}`: there is nothing to learn",
            f"role `{strange}`: {closest(strange, ROLES, KNOWN_ROLES)}" if strange else "",
        )
    return tuple(found)


def check_roles(messages: Iterable[Message], template: str, where: str) -> None:
    """Raises RequestError for a role that is none of the usual ones and that the chat template, whose text this
    is, does not name: a misspelt one, which a template would write as it is."""
    for role in dict.fromkeys(turn["role"] for turn in messages if turn["role"] not in ROLES):
        if re.search(rf"""["']{re.escape(role)}\\?["']""", template, re.IGNORECASE):
            continue
        raise RequestError(f"`{where}`: role `{role}` is not known", closest(role, ROLES, KNOWN_ROLES))


def _in_rows(value: Any) -> Any:
    """{"role": [...], "content": [...]} as a list of messages."""
    if not isinstance(value, dict):
        return value
    columns = {k: v for k, v in value.items() if isinstance(v, (list, tuple))}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or not columns.keys() & {"role", "from"}:
        return value
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _message(given: Any, key: str, where: str, kept_nulls: Iterable[str]) -> Message:
    if not isinstance(given, dict):
        raise RequestError(f"`{where}`: a message in `{key}` has no `role`")
    turn: Message = given
    strict = "from" in turn and "role" not in turn
    if strict:
        said = turn.get("value")
        if not isinstance(said, str) and not turn.get("tool_calls"):
            raise RequestError(
                f"`{where}`: the `value` of a message in `{key}` is {kind_of(said)}, not a string"
            )
        turn = {
            "role": turn["from"],
            "content": said,
            **{k: v for k, v in turn.items() if k not in ("from", "value")},
        }
    role = turn.get("role")
    if not isinstance(role, str) or not role.strip():
        raise RequestError(f"`{where}`: a message in `{key}` has no `role`")
    known = SPEAKERS.get(role.strip().lower())
    if known is None and strict:
        raise RequestError(f"`{where}`: unknown speaker `{role}` in `{key}`", closest(role, SPEAKERS))
    turn = {**without_nulls(turn, kept_nulls), "role": known or role.strip()}
    if isinstance(turn.get("content"), list):
        turn["content"] = _joined(turn["content"], key, where)
    if known == "function_call":
        turn = _called(turn, where, key)
    legacy = from_text(turn.pop("function_call", None), where, "function_call")
    if legacy and not turn.get("tool_calls"):
        turn["tool_calls"] = [{"type": "function", "function": legacy}]
    turn["tool_calls"] = from_text(turn.get("tool_calls"), where, "tool_calls")
    if not turn["tool_calls"]:
        del turn["tool_calls"]
    elif not isinstance(turn["tool_calls"], list) or not all(isinstance(c, dict) for c in turn["tool_calls"]):
        raise RequestError(f"`{where}`: `tool_calls` in `{key}` is not a list of calls")
    odd = next(
        (c["function"] for c in turn.get("tool_calls", ()) if not isinstance(c.get("function", c), dict)),
        None,
    )
    if odd is not None:
        raise RequestError(
            f"`{where}`: the `function` of a tool call in `{key}` is {kind_of(odd)}, not an object",
            'e.g. {"function": {"name": "find", "arguments": {}}}',
        )
    if not isinstance(turn.get("content"), str):
        called = turn.get("tool_calls") or any(isinstance(turn.get(k), str) for k in REASONING)
        if not called and turn.get("content", 0) is not None:
            raise RequestError(f"`{where}`: the `content` of a message in `{key}` is not a string")
        turn["content"] = None if called and "content" in turn else ""
    return turn


def _called(turn: Message, where: str, key: str) -> Message:
    """A turn that is one tool call, written as JSON text."""
    if turn.get("tool_calls"):
        return {**turn, "role": "assistant"}
    calls = from_text(turn.get("content"), where, key)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"`{where}`: a function call in `{key}` is not an object")
    called = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    return {**turn, "role": "assistant", "content": "", "tool_calls": called}


def _joined(parts: list[Any], key: str, where: str) -> str:
    """The text of a message that is written in parts."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RequestError(f"`{where}`: a message in `{key}` holds `{kind}`: only text is learned here")
    return "".join(part["text"] for part in parts)


def tools_of(row: Message, where: str, kept_nulls: Iterable[str] = KEPT_NULLS) -> tuple[Any, ...]:
    """The tools of a row: `tools`, or `functions` as they were called before."""
    value = from_text(row.get("tools"), where, "tools")
    old = from_text(row.get("functions"), where, "functions")
    if not value and isinstance(old, list):
        value = [{"type": "function", "function": each} for each in old]
    if not value:
        return ()
    if not isinstance(value, list):
        raise RequestError(f"`{where}`: `tools` is not a list of tools")
    return tuple(without_nulls([_schema(tool) for tool in value], kept_nulls))


def _schema(tool: Any) -> Any:
    """A tool, where it or its `parameters` are written as JSON text, as it is meant: an object."""
    tool = as_object(tool)
    if not isinstance(tool, dict):
        return tool
    if isinstance(inner := as_object(tool.get("function")), dict):
        return {**tool, "function": _schema(inner)}
    return {**tool, "parameters": as_object(tool["parameters"])} if "parameters" in tool else tool


def as_object(value: Any) -> Any:
    """The object that a text is as JSON; anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            return found if isinstance(found, dict) else value
    return value


def weight_of(turn: Message, where: str) -> float:
    """What a turn counts in the loss: the product of its weights; 1 where it has none.

    Raises RequestError for what is not a weight.
    """
    weight = 1.0
    for name in WEIGHTS:
        value = turn.get(name)
        if value is None or value == "":
            continue
        number = _number(value)
        if number is None or not 0 <= number < float("inf"):
            raise RequestError(
                f"`{where}`: `{name}` of a message is {value!r}: a weight is true, false, or a number from 0 on"
            )
        weight *= number
    return weight


def row_weights(row: Message, where: str) -> dict[str, float]:
    """The weights of a row by column. A column `weight` or `train` with other values than weights have, from 0
    to 1, is not one: people have such columns. `loss_weight` is, and may be above 1.

    Raises RequestError for a `loss_weight` that is not a number from 0 on.
    """
    found = {}
    for name in ROW_WEIGHTS:
        value = row.get(name)
        if value is None or value == "":
            continue
        number = _number(value)
        if number is not None and 0 <= number <= (float("inf") if name == "loss_weight" else 1):
            found[name] = number
        elif name == "loss_weight":
            raise RequestError(f"`{where}`: `loss_weight` is {value!r}: a weight is a number from 0 on")
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, int, float)):
        return float(value)
    if isinstance(value, str):
        words = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
        try:
            return words.get(value.strip().lower()) if value.strip().lower() in words else float(value)
        except ValueError:
            return None
    return None
