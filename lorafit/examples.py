"""Files and hub sets become examples, one after the other: nothing is held but the one that is read.

Containers, by their name: .jsonl and .json (one list), .csv and .tsv (the first line names the
columns), .txt and .md, each of them packed (.gz) or not; .parquet, .arrow; a folder or a pattern
of those; a hub set as `owner/name:config:split`.

Shapes of a row, seen in the first one unless `--format` says otherwise:

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

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lorafit.errors import RequestError, closest
from lorafit.survey import HUB_ID

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text",
    ".md": "text", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
LONGEST_LINE = 32_000_000  # bytes of one example: more is a file that was meant otherwise
LARGEST_LIST = 512_000_000  # bytes of a .json file, which is read at once
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
SPLIT = re.compile(r"(?:^|[^a-z])(train|test|valid|validation|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)
Message = dict[str, Any]
Tick = Callable[[int], None]


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


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or one hub set: where its rows are read."""

    name: str
    kind: str
    path: Path | None = None
    packed: bool = False

    @property
    def bytes(self) -> int:
        """The size of the file; 0 for a hub set."""
        return self.path.stat().st_size if self.path else 0

    def where(self, number: int) -> str:
        """How a row is named: by line where a line is a row."""
        if self.kind in ("jsonl", "csv", "tsv", "text"):
            return f"{self.name}:{number}"
        return f"{self.name}[{number}]"


def sources(spec: str) -> list[Source]:
    """The files of a file, a folder or a pattern, or the hub set of that name.

    Raises RequestError for what is not there or is no kind of file that is read.
    """
    path = Path(spec).expanduser()
    try:
        if path.is_file():
            return [_source(path, spec)]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file() and _kind_of(p)[0] and p.name[0] != ".")
            found = [
                p for p in files if p.suffix != ".md" and p.name not in ("state.json", "dataset_info.json")
            ]
        elif any(c in path.name for c in "*?["):
            found = sorted(p for p in path.parent.glob(path.name) if p.is_file())
        else:
            return [_hub(spec)]
    except OSError as error:
        raise RequestError(f"cannot read `{spec}`: {error.strerror}") from None
    if not found:
        raise RequestError(f"there is no data file in `{spec}`", f"data are {_kinds()} files")
    splits = {match[1].lower() for p in found if (match := SPLIT.search(p.name))}
    if len(splits) > 1 and path.is_dir():
        raise RequestError(
            f"`{spec}` holds several splits: {', '.join(sorted(splits))}",
            f"name the files: --data '{spec.rstrip('/')}/*{sorted(splits)[-1]}*'",
        )
    return [_source(p, str(p)) for p in found]


def _kind_of(path: Path) -> tuple[str, bool]:
    packed = path.suffix == ".gz"
    name = path.with_suffix("") if packed else path
    kind = KINDS.get(name.suffix.lower(), "")
    return ("" if packed and kind in ("parquet", "arrow") else kind), packed


def _kinds() -> str:
    return ", ".join(k for k in KINDS if k not in (".ndjson", ".md"))


def _source(path: Path, name: str) -> Source:
    kind, packed = _kind_of(path)
    if not kind:
        raise RequestError(f"`{name}` is no kind of file that is read here", f"data are {_kinds()} files")
    return Source(name, kind, path, packed)


def _hub(spec: str) -> Source:
    name = spec.partition(":")[0]
    if "/" in name and HUB_ID.fullmatch(name) and not _kind_of(Path(name))[0]:
        return Source(spec, "hub")
    raise RequestError(
        f"there is no file `{spec}`", f"data are {_kinds()} files, folders of them, or a hub set"
    )


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


# -- rows of a file ---------------------------------------------------------------------------


def records(source: Source, tick: Tick = lambda n: None) -> Iterator[tuple[int, Any]]:
    """(number, row) of a source that is no text, lazily; `tick` hears how many bytes were read.

    Raises RequestError with file and line for what cannot be read.
    """
    with _said(source):
        if source.kind == "hub":
            yield from _read_hub(source.name)
            return
        if source.kind in ("parquet", "arrow"):
            yield from _read_columns(source, tick)
            return
        with _opened(source) as (file, raw):
            reader = {"jsonl": _read_lines, "json": _read_list}.get(source.kind, _read_table)
            for number, row in reader(source, file):
                yield number, row
                if number % 256 == 0:
                    tick(raw.tell())


@contextmanager
def _said(source: Source) -> Iterator[None]:
    """What the reading of a file raises, in our words."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(f"`{source.name}` is damaged: {error}", "fetch the file anew") from None
    except OSError as error:
        raise RequestError(f"cannot read `{source.name}`: {error.strerror or error}") from None


@contextmanager
def _opened(source: Source) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the bytes of a file, unpacked; the file itself, which knows how far it was read)."""
    assert source.path is not None
    with source.path.open("rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise RequestError(f"`{source.name}` is UTF-16", "save the file as UTF-8")
        if source.packed:
            with gzip.GzipFile(fileobj=raw) as file:
                yield file, raw
        else:
            yield raw, raw


def _line_of(source: Source, number: int, line: bytes) -> str:
    if len(line) > LONGEST_LINE:
        raise RequestError(
            f"`{source.name}:{number}` is a line of more than {LONGEST_LINE // 10**6} MB",
            "one example a line; a long text is a .txt file, cut into windows",
        )
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"`{source.name}:{number}` is not UTF-8 (byte 0x{line[error.start]:02x})",
            "save the file as UTF-8",
        ) from None


def _lines(source: Source, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """(number, line) without the ends of lines. U+2028 ends none."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        yield number, _line_of(source, number, line).rstrip("\r\n")


def _read_lines(source: Source, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(source, file):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            why = "it holds NUL bytes" if "\0" in line else str(error)
            raise RequestError(
                f"`{source.name}:{number}` is no JSON: {why}",
                "each line is one JSON object"
                + (", a list of them is .json" if line.strip() in "[{" else ""),
            ) from None


def _read_list(source: Source, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    raw = file.read(LARGEST_LIST + 1)
    if len(raw) > LARGEST_LIST:
        raise RequestError(
            f"`{source.name}` is a list of more than {LARGEST_LIST // 10**6} MB, which is read at once",
            "one object a line is .jsonl, and read bit by bit",
        )
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"`{source.name}:{line}` is not UTF-8 (byte 0x{raw[error.start]:02x})", "save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"`{source.name}` is no JSON: {error}", "one object a line is .jsonl") from None
    if isinstance(data, dict):  # {"data": [...]}, as some sets are
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else None
    if not isinstance(data, list):
        raise RequestError(f"`{source.name}` holds no list of examples")
    yield from enumerate(data, 1)


def _read_table(source: Source, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """The rows of a .csv or .tsv as dictionaries: the first line names the columns."""
    csv.field_size_limit(LONGEST_LINE)
    lines = (line + "\n" for _, line in _lines(source, file))
    table = csv.reader(lines, delimiter="\t" if source.kind == "tsv" else ",", strict=True)
    try:
        header = [name.strip() for name in next(table, [])]
        if not any(header):
            return
        if "" in header or len(set(header)) < len(header):
            odd = next(n or "" for n in header if n == "" or header.count(n) > 1)
            what = f"the column `{odd}` twice" if odd else "a column without a name"
            raise RequestError(
                f"`{source.name}:1` names {what}", "the first line names the columns, each once"
            )
        for row in table:
            if not row:
                continue
            if len(row) != len(header):
                raise RequestError(
                    f"`{source.name}:{table.line_num}` has {len(row)} fields, and the first line names {len(header)}",
                    "a field that holds a separator, a quote or a line break stands in quotes",
                )
            yield table.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise RequestError(f"`{source.name}:{table.line_num}` is no {source.kind.upper()}: {error}") from None


def _read_columns(source: Source, tick: Tick) -> Iterator[tuple[int, Any]]:
    """The rows of a .parquet or .arrow file (the kind that `datasets` writes, or Arrow's own)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, size = 0, source.bytes
    try:
        if source.kind == "parquet":
            parquet = pq.ParquetFile(source.path)
            rows, batches = parquet.metadata.num_rows, parquet.iter_batches(batch_size=512)
        else:
            mapped = pa.memory_map(str(source.path))
            try:
                stream = pa.ipc.open_stream(mapped)
                rows, batches = 0, iter(stream)
            except pa.ArrowInvalid:
                stored = pa.ipc.open_file(mapped)
                rows, batches = 0, (stored.get_batch(n) for n in range(stored.num_record_batches))
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
            if rows:
                tick(size * number // rows)
    except (pa.ArrowException, OSError) as error:
        text = str(error).splitlines()
        raise RequestError(
            f"`{source.name}` is damaged: {text[0][:160] if text else error}", "fetch the file anew"
        ) from None


def _read_hub(spec: str) -> Iterator[tuple[int, Any]]:
    """A hub set, `owner/name:config:split`; without a split `train`."""
    import datasets

    name, *rest = spec.split(":")
    datasets.disable_progress_bars()
    config = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else "train"
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the network and the builders each have kinds of their own
        text = str(error).splitlines()
        raise RequestError(
            f"`{spec}` is no file here, and the hub did not give it: {text[0][:200] if text else error}",
            "write it as owner/name, owner/name:split or owner/name:config:split",
        ) from None
    yield from enumerate(found, 1)


# -- examples ---------------------------------------------------------------------------------


def read(
    source: Source,
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


def _texts(source: Source, format: str, tick: Tick) -> Iterator[Example]:
    """A text file's lines, or the file itself in blocks that end where a line does."""
    with _said(source), _opened(source) as (file, raw):
        block, size, start = [], 0, 1
        for number, line in _lines(source, file):
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


def _mapped(source: Source, columns: Mapping[str, str], tick: Tick) -> Iterator[tuple[int, Message]]:
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


def _format_of(row: Message, source: Source, number: int) -> str:
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
