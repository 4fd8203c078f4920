"""Data files and hub sets to rows, one at a time: nothing is held but the row that is read.

Containers, by name: .jsonl and .json (one list), .csv and .tsv (the first line names the columns),
.txt and .md, each of them compressed (.gz) or not; .parquet, .arrow; a folder or a pattern of those; a hub
set as `owner/name:config:split`.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lorafit.errors import RequestError
from lorafit.model import HUB_ID
from lorafit.settings import RunConfig, weighted

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text",
    ".md": "text", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip

LONGEST_LINE = 32_000_000  # bytes of one example: more is a file that was meant otherwise

LARGEST_LIST = 512_000_000  # bytes of a .json file, which is read at once

SPLIT = re.compile(r"(?:^|[^a-z])(train|test|valid|validation|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class DataSource:
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


def sources(spec: str) -> list[DataSource]:
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


def _source(path: Path, name: str) -> DataSource:
    kind, packed = _kind_of(path)
    if not kind:
        raise RequestError(f"`{name}` is no kind of file that is read here", f"data are {_kinds()} files")
    return DataSource(name, kind, path, packed)


def _hub(spec: str) -> DataSource:
    name = spec.partition(":")[0]
    if "/" in name and HUB_ID.fullmatch(name) and not _kind_of(Path(name))[0]:
        return DataSource(spec, "hub")
    raise RequestError(
        f"there is no file `{spec}`", f"data are {_kinds()} files, folders of them, or a hub set"
    )


def records(source: DataSource, tick: Tick = lambda n: None) -> Iterator[tuple[int, Any]]:
    """(number, row) of a source that is no text, lazily; `tick` hears how many bytes were read.

    Raises RequestError with file and line for what cannot be read.
    """
    with reading_errors(source):
        if source.kind == "hub":
            yield from _read_hub(source.name)
            return
        if source.kind in ("parquet", "arrow"):
            yield from _read_columns(source, tick)
            return
        with opened_file(source) as (file, raw):
            reader = {"jsonl": _read_lines, "json": _read_list}.get(source.kind, _read_table)
            for number, row in reader(source, file):
                yield number, row
                if number % 256 == 0:
                    tick(raw.tell())


@contextmanager
def reading_errors(source: DataSource) -> Iterator[None]:
    """What the reading of a file raises, in our words."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(f"`{source.name}` is damaged: {error}", "fetch the file anew") from None
    except OSError as error:
        raise RequestError(f"cannot read `{source.name}`: {error.strerror or error}") from None


@contextmanager
def opened_file(source: DataSource) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
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


def _line_of(source: DataSource, number: int, line: bytes) -> str:
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


def lines_of(source: DataSource, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """(number, line) without the ends of lines. U+2028 ends none."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        yield number, _line_of(source, number, line).rstrip("\r\n")


def _read_lines(source: DataSource, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in lines_of(source, file):
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


def _read_list(source: DataSource, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
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


def _read_table(source: DataSource, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """The rows of a .csv or .tsv as dictionaries: the first line names the columns."""
    csv.field_size_limit(LONGEST_LINE)
    lines = (line + "\n" for _, line in lines_of(source, file))
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


def _read_columns(source: DataSource, tick: Tick) -> Iterator[tuple[int, Any]]:
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


def find_sources(config: RunConfig) -> None:
    """Check that the data of a run are there: before anything is loaded. Raises RequestError as `sources`."""
    for spec in (*config.data, *config.eval_data):
        sources(weighted(spec)[0])
