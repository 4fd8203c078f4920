"""Rows to examples: the shapes a row may have, detected in the first one unless `--format` names it.

    messages           {"messages": [{"role": "user", "content": ...}, ...]}
    conversations      {"conversations": [{"from": "human", "value": ...}, ...]}, ShareGPT's
    prompt-completion  {"prompt": ..., "completion": ...}: two texts, or two lists of messages
    instruction        {"instruction": ..., "input": ..., "output": ...}, Alpaca's
    text               {"text": ...}
    tokens             {"input_ids": [...], "labels": [...]}: ids, taken as they are; -100 is not learned
    lines              each line of a text file is an example
    document           a text file is one document, cut into windows

Beside the turns a row may hold `system`, a text, and `tools`, a list for the chat template; `weight: 0` or
`train: false`, of a row or a message, keeps it out of the loss. Columns that are not read are counted.
`--map prompt=question,completion=answer` gives columns the names that are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from lorafit.data.counts import Counts
from lorafit.data.example import Blank, EmptyAnswer, Example, Reading
from lorafit.data.files import lines_of, opened_file, reading_errors, records, resembles_json
from lorafit.data.messages import (
    KEPT_NULLS,
    WEIGHTS,
    Message,
    from_text,
    kind_of,
    messages_of,
    row_weights,
    tools_of,
    weight_of,
)
from lorafit.data.source import DataSource, Tick
from lorafit.data.token_rows import tokens_of
from lorafit.errors import RequestError, closest

BLOCK = 4_000_000  # characters of a document that are read at once
UNKNOWN = 100  # rows of no known shape at the head of a file: it has none

COLUMNS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "input_ids", "labels",
)  # fmt: skip
BESIDE = ("system", "tools", "functions")  # columns that go with messages
READ = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output", "history"),
    "text": ("text",),
    "tokens": ("input_ids", "labels", "weights", "attention_mask", "token_type_ids"),
}
SAID = ("role", "content", "from", "value", "tool_calls", "function_call")  # keys of a message

# Columns by which people name a question and its answer, for the hint that names --map.
ASKED = ("question", "query", "problem", "input", "source", "instruction", "context", "article")

ANSWERED = ("answer", "response", "solution", "output", "target", "summary", "reply", "label")


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
        if name not in (*COLUMNS, *BESIDE):
            raise RequestError(f"--map names `{name}`, which is not read", closest(name, COLUMNS))
        found[name] = column
    return found


def read(
    source: DataSource,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    tick: Tick = lambda n: None,
    reading: Reading | None = None,
) -> tuple[str, Iterator[Example]]:
    """The format of a source, and its examples, read as they are asked for.

    Raises RequestError for a source that is empty or whose rows have no shape that is known; the examples
    raise it for what comes later, with file and line, or hand it to the `fault` of `reading`.
    """
    reading = reading or Reading(format, columns or {})
    format = reading.format
    if source.kind == "text" and format not in ("document", "lines", "text") and _holds_rows(source, reading):
        source = source.as_kind("jsonl")
    elif source.is_text and format in ("document", "lines"):
        source = source.as_kind("text")
    if source.kind == "text":
        if format not in ("auto", "document", "lines", "text"):
            raise RequestError(
                f"--format {format}: `{source.name}` is plain text", "use `document` or `lines`"
            )
        if reading.group_by:
            raise RequestError(f"--group-by: `{source.name}` is plain text and has no columns")
        format = "lines" if format == "lines" else "document"
        found = _texts(source, format, tick)
    else:
        if format in ("lines", "document"):
            raise RequestError(f"--format {format} is for text files, and `{source.name}` holds rows")
        format, found = _rows(source, reading, tick)
    head = next(found, None)
    if head is None:
        if reading.counts.bad or reading.counts.weightless:
            return format, iter(())
        if empty := reading.counts.empty:
            all_of = f", as in all {empty:,} rows" if empty > 1 else ""
            raise RequestError(f"{reading.counts.empty_first}{all_of}")
        blank = reading.counts.blank
        raise RequestError(
            f"`{source.name}` is empty"
            if not blank
            else f"`{source.name}` is empty: nothing to learn in its {blank:,} blank rows"
        )
    return format, _and_rest(head, found)


def _holds_rows(source: DataSource, reading: Reading) -> bool:
    """Whether a text file holds JSON lines of a known format: other lines are text."""
    if not resembles_json(source):
        return False
    if reading.format != "auto" or reading.columns:
        return True
    try:
        number, row = next(records(source.as_kind("jsonl")))
        return bool(_format_of(row, source, number))
    except (RequestError, StopIteration):
        return False


def _and_rest(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _rows(source: DataSource, reading: Reading, tick: Tick) -> tuple[str, Iterator[Example]]:
    """The format, by the first row that has one, and the examples."""
    rows = _mapped(source, reading, tick)
    format, first, unknown = reading.format, None, []
    if format == "auto":
        for number, row in rows:
            if _is_blank(row):
                reading.counts.skip_blank(source.where(number))
                continue
            try:
                format, first = _format_of(row, source, number), (number, row)
                break
            except RequestError as error:
                unknown.append(error)
                if len(unknown) >= UNKNOWN:
                    break
        if first is None:
            if unknown:
                raise unknown[0]
            return format, iter(())
        for fault in unknown:
            reading.fault(fault)
    every = rows if first is None else _and_rest(first, rows)
    return format, _examples(every, source, format, reading)


def _examples(
    rows: Iterator[tuple[int, Message]], source: DataSource, format: str, reading: Reading
) -> Iterator[Example]:
    counts = reading.counts
    kept_nulls = () if source.is_table else KEPT_NULLS
    read_columns = {*READ[format], *(() if reading.group_by == "" else (reading.group_by,))}
    for number, row in rows:
        where = source.where(number)
        try:
            if _is_blank(row):
                raise Blank
            weights = row_weights(row, where)
            weight = prod(weights.values())
            if not weight:
                counts.weightless += 1
                continue
            example = _example(row, where, format, number, reading, kept_nulls)
            if weight != 1:
                counts.weigh(weight)
                example = replace(example, weight=weight)
        except Blank:
            counts.skip_blank(where)
            continue
        except EmptyAnswer as error:
            counts.leave_empty(error.message)
            continue
        except RequestError as error:
            reading.fault(error)
            continue
        beside = BESIDE if example.messages else ()
        for column in row:
            if column not in read_columns and column not in beside and column not in weights:
                counts.unused[str(column)] = counts.unused.get(str(column), 0) + 1
        yield example


def _is_blank(row: Message) -> bool:
    """Whether all cells of a row are empty, as in the last lines that a spreadsheet saves."""
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in row.values())


def _texts(source: DataSource, format: str, tick: Tick) -> Iterator[Example]:
    """A text file's lines, or the file itself in blocks that end where a line does."""
    with reading_errors(source), opened_file(source) as (file, raw):
        block: list[str] = []
        size, start = 0, 1
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


def _mapped(source: DataSource, reading: Reading, tick: Tick) -> Iterator[tuple[int, Message]]:
    """The rows, with `--map`'s names for their columns."""
    columns, good = reading.columns, 0
    for number, row in records(source, tick, reading.fault):
        where = source.where(number)
        if not isinstance(row, dict):
            reading.fault(RequestError(f"`{where}` is not a JSON object but {kind_of(row)}"))
            continue
        missing = next((c for c in columns.values() if c not in row), None)
        if missing is not None and not _is_blank(row):
            error = RequestError(
                f"`{where}` has no column `{missing}`, which --map names", closest(missing, map(str, row))
            )
            if not good:  # no row has it so far: --map is wrong
                raise error
            reading.fault(error)
            continue
        good += 1
        if columns and missing is None:
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
    if "input_ids" in row:
        return "tokens"
    if "text" in row:
        return "text"
    keys = ", ".join(f"`{str(key)[:40]}`" for key in list(row)[:6]) or "nothing"
    where = source.where(number)
    if "chosen" in row and "rejected" in row:
        to = "messages" if isinstance(row["chosen"], list) else "completion"
        raise RequestError(
            f"`{where}` holds preferences (`chosen`, `rejected`), which lorafit does not train on",
            f"--map {to}=chosen learns what was chosen",
        )
    asked = next((key for key in ASKED if key in row), None)
    answered = next((key for key in ANSWERED if key in row and key != asked), None)
    hint = "rows hold `messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, `text`, or `input_ids` and `labels`"
    if "instruction" in row and answered:
        more = ",input=context" if "context" in row and "input" not in row else ""
        hint = f"--map output={answered}{more}"
    elif asked and answered:
        hint = f"--map prompt={asked},completion={answered}"
    elif source.kind in ("csv", "tsv"):
        hint = f"the first line names the columns; {hint}"
    raise RequestError(f"`{where}` holds {keys}: not a known data format", hint)


def _string(row: Message, key: str, where: str) -> str:
    value = row.get(key)
    if value is None and key in row:
        return ""
    if not isinstance(value, str):
        kind = "missing" if key not in row else f"{kind_of(value)}, not a string"
        raise RequestError(f"`{where}`: `{key}` is {kind}")
    return value


def _answer(row: Message, key: str, where: str) -> str:
    """An answer that is learned. Raises RequestError for an empty one."""
    value = _string(row, key, where)
    if not value.strip():
        raise EmptyAnswer(f"`{where}`: the answer is empty")
    return value


def _example(
    row: Message, where: str, format: str, number: int, reading: Reading, kept_nulls: tuple[str, ...]
) -> Example:
    group = ""
    if reading.group_by:
        if reading.group_by not in row:
            raise RequestError(
                f"`{where}` has no column `{reading.group_by}`, which --group-by names",
                closest(reading.group_by, map(str, row)),
            )
        group = str(row[reading.group_by])
    asked = 0
    match format:
        case "messages":
            turns = messages_of(_filled(row, "messages", where), "messages", where, kept_nulls=kept_nulls)
        case "conversations":
            key = "conversations" if "conversations" in row else "conversation"
            turns = messages_of(_filled(row, key, where), key, where, kept_nulls=kept_nulls)
        case "instruction":
            turns = _instruction(row, where)
        case "prompt-completion" if isinstance(row.get("prompt"), (list, dict)):
            before = messages_of(row["prompt"], "prompt", where, ends=False, kept_nulls=kept_nulls)
            completion = row.get("completion")
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": _answer(row, "completion", where)}]
            turns = before + messages_of(completion, "completion", where, kept_nulls=kept_nulls)
            asked = len(before)
        case "prompt-completion":
            completion = _answer(row, "completion", where)
            prompt = _string(row, "prompt", where)
            if not reading.as_chat:
                return Example(where, prompt=prompt, completion=completion, number=number, group=group)
            turns = (_turn("user", prompt), _turn("assistant", completion))
        case "tokens":
            ids, labels, each = tokens_of(row, where)
            return Example(where, ids=ids, labels=labels, each=each, number=number, group=group)
        case _:
            text = _string(row, "text", where)
            if not text.strip():
                raise Blank
            return Example(where, text=text, number=number, group=group)
    if system := row.get("system"):
        if isinstance(system, str) and turns[0]["role"] != "system":
            turns = (_turn("system", system), *turns)
            asked += bool(asked)
        elif system != turns[0]["content"]:
            why = (
                "the conversation has a system turn"
                if isinstance(system, str)
                else f"it is {kind_of(system)}"
            )
            reading.counts.note(f"a `system` column is not used where {why}")
    return _conversation(row, turns, asked, where, number, group, reading.counts, kept_nulls)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _filled(row: Message, key: str, where: str) -> Any:
    """The messages of a row. Raises RequestError where there are none."""
    value = row.get(key)
    if key in row and value in (None, "", []):
        raise EmptyAnswer(f"`{where}`: the answer is empty: there are no messages in `{key}`")
    return value


def _conversation(
    row: Message,
    turns: tuple[Message, ...],
    asked: int,
    where: str,
    number: int,
    group: str,
    counts: Counts,
    kept_nulls: tuple[str, ...],
) -> Example:
    """An example of turns: which of the assistant's are not learned, and the turns without those marks."""
    skipped, weights, empty = set(), dict[int, float](), 0
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant" and n >= asked]
    for n in answers:
        said = turns[n]
        weight = weight_of(said, where)
        if not weight:
            skipped.add(n)
            counts.weightless += 1
        elif not said.get("tool_calls") and not any(
            isinstance(v, str) and v.strip() for k, v in said.items() if k not in ("role", "name", *WEIGHTS)
        ):
            skipped.add(n)
            empty += 1
        elif weight != 1:
            weights[n] = weight
            counts.weigh(weight)
    if empty == len(answers):
        raise EmptyAnswer(f"`{where}`: the answer is empty")
    if empty:
        counts.note("empty answers within conversations are not learned")
    for turn in turns:
        for key in turn:
            if key not in SAID and key not in WEIGHTS:
                counts.unused_keys[key] = counts.unused_keys.get(key, 0) + 1
    plain = tuple({k: v for k, v in turn.items() if k not in WEIGHTS} for turn in turns)
    tools = tools_of(row, where, kept_nulls)
    return Example(
        where, plain, tools, asked, number=number, group=group, skipped=frozenset(skipped), weights=weights
    )


def _instruction(row: Message, where: str) -> tuple[Message, ...]:
    """Alpaca's instruction, its input below it, and the output as an answer; `history` is [[question, answer], ...]."""
    asked = _string(row, "instruction", where)
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise RequestError(f"`{where}`: `input` is {kind_of(more)}, not a string")
    turns: list[Message] = []
    past = from_text(row.get("history"), where, "history") or []
    if not isinstance(past, list):
        raise RequestError(f"`{where}`: `history` is not a list of pairs")
    for pair in past:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RequestError(f"`{where}`: `history` is not a list of pairs")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    question = "\n\n".join(text for text in (asked, more) if text)
    return (*turns, _turn("user", question), _turn("assistant", _answer(row, "output", where)))
