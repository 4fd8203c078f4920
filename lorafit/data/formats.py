"""Rows to examples: the shapes a row may have, detected in the first one unless `--format` names it.

    messages           {"messages": [{"role": "user", "content": ...}, ...]}
    conversations      {"conversations": [{"from": "human", "value": ...}, ...]}, ShareGPT's
    prompt-completion  {"prompt": ..., "completion": ...}: two texts, or two lists of messages
    instruction        {"instruction": ..., "input": ..., "output": ...}, Alpaca's
    text               {"text": ...}
    lines              each line of a text file is an example
    document           a text file is one document, cut into windows

Beside the turns a row may hold `system`, a text, and `tools`, a list for the chat template.
`--map prompt=question,completion=answer` gives columns the names that are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorafit.data.files import DataSource, Tick, lines_of, opened_file, reading_errors, records
from lorafit.errors import RequestError, closest

BLOCK = 4_000_000  # characters of a document that are read at once

COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text")

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "bard": "assistant", "bing": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip

# Columns by which people name a question and its answer, for the hint that names --map.
ASKED = ("question", "query", "problem", "input", "source", "instruction", "context", "article")

ANSWERED = ("answer", "response", "solution", "output", "target", "summary", "reply", "label")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One example as it was read: `messages`, or `prompt` and `completion`, or `text`.

    `where` is its file and line, `number` its place in the file.
    """

    where: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    asked: int = 0  # messages at the head that belong to the prompt: none of them is learned
    prompt: str = ""
    completion: str = ""
    text: str = ""
    number: int = 0

    @property
    def kind(self) -> str:
        if self.messages:
            return "messages"
        return "prompt-completion" if self.completion else "text"


def parse_map(text: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` as {"prompt": "question", ...}. Raises RequestError."""
    found = {}
    for pair in (text or "").split(","):
        if not pair.strip():
            continue
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not column:
            raise RequestError(
                f"--map is `{text}`: it takes NAME=COLUMN pairs", "as prompt=question,completion=answer"
            )
        if name not in (*COLUMNS, "system", "tools"):
            raise RequestError(f"--map names `{name}`, which is not read", closest(name, COLUMNS))
        found[name] = column
    return found


def read(
    source: DataSource,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    tick: Tick = lambda n: None,
) -> tuple[str, Iterator[Example]]:
    """The format of a source, and its examples, read as they are asked for.

    Raises RequestError for a source that is empty or whose first row has no shape that is known;
    the examples raise it for what comes later, with file and line.
    """
    if source.kind == "text":
        if format not in ("auto", "document", "lines", "text"):
            raise RequestError(
                f"--format {format}: `{source.name}` is plain text", "use `document` or `lines`"
            )
        format = "lines" if format == "lines" else "document"
        found = _texts(source, format, tick)
    else:
        if format in ("lines", "document"):
            raise RequestError(f"--format {format} is for text files, and `{source.name}` holds rows")
        rows = _mapped(source, columns or {}, tick)
        first = next(rows, None)
        if first is None:
            raise RequestError(f"`{source.name}` is empty")
        if format == "auto":
            format = _format_of(first[1], source, first[0])
        chosen = format
        found = (_example(row, source.where(n), chosen, n) for n, row in _and_rest(first, rows))
    head = next(found, None)
    if head is None:
        raise RequestError(f"`{source.name}` is empty")
    return format, _and_rest(head, found)


def _and_rest(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _texts(source: DataSource, format: str, tick: Tick) -> Iterator[Example]:
    """A text file's lines, or the file itself in blocks that end where a line does."""
    with reading_errors(source), opened_file(source) as (file, raw):
        block, size, start = [], 0, 1
        for number, line in lines_of(source, file):
            if number % 256 == 0:
                tick(raw.tell())
            if format == "lines":
                if line.strip():
                    yield Example(source.where(number), text=line, number=number)
                continue
            if size > BLOCK and line[:1].strip():  # white space stays with what it follows
                yield Example(source.where(start), text="".join(block), number=start)
                block, size, start = [], 0, number
            block.append(line + "\n")
            size += len(line)
        text = "".join(block)
        if text.strip():
            yield Example(source.where(start), text=text, number=start)


def _mapped(source: DataSource, columns: Mapping[str, str], tick: Tick) -> Iterator[tuple[int, Message]]:
    """The rows, with `--map`'s names for their columns."""
    for number, row in records(source, tick):
        where = source.where(number)
        if not isinstance(row, dict):
            raise RequestError(f"`{where}` is no JSON object but {_kind(row)}")
        for column in columns.values():
            if column not in row:
                raise RequestError(
                    f"`{where}` has no column `{column}`, which --map names", closest(column, map(str, row))
                )
        if columns:
            taken = set(columns.values())
            row = {k: v for k, v in row.items() if k not in taken} | {n: row[c] for n, c in columns.items()}
        yield number, row


def _format_of(row: Message, source: DataSource, number: int) -> str:
    if "messages" in row:
        return "messages"
    if "conversations" in row or "conversation" in row:
        return "conversations"
    if "prompt" in row and "completion" in row:
        return "prompt-completion"
    if "instruction" in row and "output" in row:
        return "instruction"
    if "text" in row:
        return "text"
    keys = ", ".join(f"`{str(key)[:40]}`" for key in list(row)[:6]) or "nothing"
    where = source.where(number)
    if "chosen" in row and "rejected" in row:
        to = "messages" if isinstance(row["chosen"], list) else "completion"
        raise RequestError(
            f"`{where}` holds preferences (`chosen`, `rejected`), which are not trained on here",
            f"--map {to}=chosen learns what was chosen",
        )
    asked = next((key for key in ASKED if key in row), None)
    answered = next((key for key in ANSWERED if key in row and key != asked), None)
    hint = "rows hold `messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, or `text`"
    if asked and answered:
        hint = f"--map prompt={asked},completion={answered}"
    elif source.kind in ("csv", "tsv"):
        hint = f"the first line names the columns; {hint}"
    raise RequestError(f"`{where}` holds {keys}: no shape that is known", hint)


def _string(row: Message, key: str, where: str, empty: bool = True) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        kind = "missing" if key not in row else f"no string but {_kind(value)}"
        raise RequestError(f"`{where}`: `{key}` is {kind}")
    if not value and not empty:
        raise RequestError(f"`{where}`: `{key}` is empty: there is nothing to learn")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", bool: "true or false", str: "a string"}
    return names.get(type(value), "a number")


def _example(row: Message, where: str, format: str, number: int) -> Example:
    match format:
        case "messages":
            turns = _messages(row.get("messages"), "messages", where)
        case "conversations":
            key = "conversations" if "conversations" in row else "conversation"
            turns = _shared(row.get(key), key, where)
        case "instruction":
            turns = _instruction(row, where)
        case "prompt-completion" if isinstance(row.get("prompt"), list):
            asked = _messages(row["prompt"], "prompt", where, ends=False)
            turns = asked + _messages(row.get("completion"), "completion", where)
            return Example(where, turns, _tools(row, where), len(asked), number=number)
        case "prompt-completion":
            completion = _string(row, "completion", where, empty=False)
            return Example(where, prompt=_string(row, "prompt", where), completion=completion, number=number)
        case _:
            return Example(where, text=_string(row, "text", where, empty=False), number=number)
    if row.get("system") and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": _string(row, "system", where)}, *turns)
    return Example(where, turns, _tools(row, where), number=number)


def _from_text(value: Any, where: str, key: str) -> Any:
    """A list that is written as JSON text, as columns of a table are."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"`{where}`: `{key}` is no JSON: {error}") from None


def _tools(row: Message, where: str) -> tuple[Any, ...]:
    value = _from_text(row.get("tools"), where, "tools")
    if not value:
        return ()
    if not isinstance(value, list):
        raise RequestError(f"`{where}`: `tools` is no list of tools")
    return tuple(value)


def _messages(value: Any, key: str, where: str, ends: bool = True) -> tuple[Message, ...]:
    value = _from_text(value, where, key)
    if not isinstance(value, list) or not value:
        raise RequestError(f"`{where}`: `{key}` is no list of messages")
    found = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise RequestError(f"`{where}`: a message in `{key}` has no `role`")
        # a table has every field in every row: what is null is not there
        turn = {name: field for name, field in turn.items() if field is not None or name == "content"}
        if isinstance(turn.get("content"), list):
            turn["content"] = _joined(turn["content"], key, where)
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise RequestError(f"`{where}`: the `content` of a message in `{key}` is no string")
        found.append(turn)
    if ends and not any(turn["role"] == "assistant" for turn in found):
        raise RequestError(f"`{where}`: no assistant speaks in `{key}`: there is nothing to learn")
    return tuple(found)


def _joined(parts: list[Any], key: str, where: str) -> str:
    """The text of a message that is written in parts."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise RequestError(f"`{where}`: a message in `{key}` holds `{kind}`: only text is learned here")
    return "".join(part["text"] for part in parts)


def _shared(value: Any, key: str, where: str) -> tuple[Message, ...]:
    """ShareGPT's turns, `from` and `value`, as messages; turns that are messages already stay."""
    value = _from_text(value, where, key)
    if isinstance(value, list) and value and all(isinstance(t, dict) and "from" in t for t in value):
        turns = []
        for turn in value:
            role = SPEAKERS.get(str(turn["from"]).lower())
            if role is None:
                raise RequestError(
                    f"`{where}`: `{turn['from']}` speaks in `{key}`", closest(str(turn["from"]), SPEAKERS)
                )
            said = _string(turn, "value", where)
            if role == "function_call":
                calls = _from_text(said, where, key)
                calls = calls if isinstance(calls, list) else [calls]
                called = [{"type": "function", "function": call} for call in calls]
                turns.append({"role": "assistant", "content": "", "tool_calls": called})
            else:
                turns.append({"role": role, "content": said})
        value = turns
    return _messages(value, key, where)


def _instruction(row: Message, where: str) -> tuple[Message, ...]:
    """Alpaca's instruction, its input below it, and the output as an answer; `history` is [[said, answered], ...]."""
    asked = _string(row, "instruction", where)
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise RequestError(f"`{where}`: `input` is no string but {_kind(more)}")
    turns: list[Message] = []
    past = _from_text(row.get("history"), where, "history") or []
    if not isinstance(past, list):
        raise RequestError(f"`{where}`: `history` is no list of pairs")
    for pair in past:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RequestError(f"`{where}`: `history` is no list of pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n\n".join(text for text in (asked, more) if text)
    answer = _string(row, "output", where, empty=False)
    return (*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer})
