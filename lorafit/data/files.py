"""Data files and hub sets to rows, one at a time: nothing is held but the row that is read.

Containers, by name: .jsonl and .json (one list, or lines), .csv and .tsv (the first line names the columns),
.txt and .md, each of them compressed (.gz, .zst) or not; .parquet, .arrow; JSON lines under any other name; a
folder, its sub-folders too, or a pattern of those; a hub set as `owner/name:config:split`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lorafit.data.source import KINDS, LONGEST_LINE, DataSource, Fault, Tick, kind_of, refuse
from lorafit.data.tables import read_table
from lorafit.data.template_file import read_template
from lorafit.errors import RequestError
from lorafit.model import HUB_ID, hub_reached, why_offline
from lorafit.outputs import RUN_FILE
from lorafit.settings import RunConfig, weighted

LARGEST_LIST = 512_000_000  # bytes of a .json file, which is read at once

SPLIT = re.compile(r"(?:^|[^a-z])(train|test|valid|validation|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)

ROW_KEYS = {"messages", "conversations", "conversation", "prompt", "instruction", "text", "input_ids"}


HALF = re.compile(r"\\u[dD][89a-fA-F]")  # a JSON escape of half a character, which may miss its other half


def sources(spec: str) -> list[DataSource]:
    """The files of a file, a folder or a pattern, or the hub set of that name.

    Raises RequestError for what is not there or is no kind of file that is read.
    """
    path = Path(spec).expanduser()
    try:
        if path.is_file():
            return [_source(path, spec)]
        if path.is_symlink() and not path.exists():
            raise RequestError(
                f"`{spec}` is a link whose target is missing", f"it points to {path.readlink()}"
            )
        if other := _other_than_data(path):
            raise RequestError(
                f"`{spec}` is {other}, not data", f"data are {_kinds()} files, or folders of them"
            )
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if _is_data(p, path)]
        elif any(c in path.name for c in "*?["):
            found = sorted(p for p in path.parent.glob(path.name) if p.is_file())
        else:
            return [_hub(spec)]
    except OSError as error:
        raise RequestError(f"cannot read `{spec}`: {error.strerror}") from None
    if not found:
        raise RequestError(f"there is no data file in `{spec}`", f"data are {_kinds()} files")
    if path.is_dir():
        splits: dict[str, list[Path]] = {}
        for each in found:
            if match := SPLIT.search(str(each.relative_to(path))):
                splits.setdefault(match[1].lower(), []).append(each)
        if len(splits) > 1:
            best = "train" if "train" in splits else max(splits)
            raise RequestError(
                f"`{spec}` holds several splits: {', '.join(sorted(splits))}",
                f"name one: --data '{_named_together(splits[best], found, best)}'",
            )
    return [_source(p, str(p)) for p in found]


DESCRIPTION = "state.json"  # of a folder that `datasets` has saved


def _named_together(files: Sequence[Path], every: Sequence[Path], split: str) -> str:
    """What names these files of a split and none of the others: a folder, or a pattern."""
    folder = Path(os.path.commonpath([file.parent for file in files]))
    if not any(other.is_relative_to(folder) for other in every if other not in files):
        return str(folder)
    said = re.search(split, files[0].name, re.IGNORECASE)
    return str(folder / f"*{said[0]}*") if said else str(files[0])


def _other_than_data(folder: Path) -> str:
    """`a model`, `an adapter` or `a run`, where a folder holds one; empty for others."""
    if (folder / RUN_FILE).is_file():
        return "a run"
    if (folder / "adapter_config.json").is_file():
        return "an adapter"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return "a model" if isinstance(config, dict) and {"model_type", "architectures"} & config.keys() else ""


def _is_data(path: Path, top: Path) -> bool:
    """Whether a file of a folder holds data: not hidden, no description of the others."""
    hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
    described = path.suffix == ".md" or path.name in (DESCRIPTION, "dataset_info.json", "dataset_dict.json")
    # what `datasets` keeps of a `map` or a `filter` beside the data
    made = path.match("cache-*.arrow") and (path.parent / DESCRIPTION).is_file()
    return not hidden and not described and not made and bool(kind_of(path)[0]) and path.is_file()


def _kinds() -> str:
    return ", ".join(k for k in KINDS if k not in (".ndjson", ".jsonlines", ".md"))


def _source(path: Path, name: str) -> DataSource:
    kind, packed = kind_of(path)
    if not kind and resembles_json(DataSource(name, "jsonl", path, packed)):
        kind = "jsonl"
    if not kind:
        raise RequestError(f"`{name}` is not a data file that lorafit reads", f"data are {_kinds()} files")
    if kind == "json" and resembles_json(DataSource(name, kind, path, packed)):
        kind = "jsonl"
    return DataSource(name, kind, path, packed)


def resembles_json(source: DataSource) -> bool:
    """Whether a file holds JSON lines, whatever its name: its first two lines are objects, or its only one."""
    lines: list[str] = []
    try:
        with opened_file(source) as (file, _):
            while len(lines) < 2 and (raw := file.readline(LONGEST_LINE)):
                line = raw.decode("utf-8-sig", errors="replace").strip()
                if line and line[0] != "{":
                    return False
                lines += [line] if line else []
        return len(lines) > (source.kind == "json") and all(
            isinstance(json.loads(each), dict) for each in lines
        )
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, RequestError):
        return False  # reading it says what is wrong


def _hub(spec: str) -> DataSource:
    name = spec.partition(":")[0]
    if "/" in name and HUB_ID.fullmatch(name) and not kind_of(Path(name))[0]:
        return DataSource(spec, "hub")
    raise RequestError(
        f"there is no file `{spec}`", f"data are {_kinds()} files, folders of them, or a hub set"
    )


def records(
    source: DataSource, tick: Tick = lambda n: None, fault: Fault = refuse
) -> Iterator[tuple[int, Any]]:
    """(number, row) of a source that holds rows, lazily; `tick` is called with the bytes that were read.

    A row that cannot be read goes to `fault`, with file and line. Raises RequestError for a file that cannot.
    """
    with reading_errors(source):
        if source.kind == "hub":
            yield from _read_hub(source.name)
            return
        if source.kind in ("parquet", "arrow"):
            yield from _read_columns(source, tick)
            return
        with opened_file(source) as (file, raw):
            if source.kind in ("csv", "tsv"):
                found = read_table(source, lines_of(source, file), fault)
            else:
                found = (_read_lines if source.kind == "jsonl" else _read_list)(source, file, fault)
            for number, row in found:
                yield number, row
                if number % 256 == 0:
                    tick(raw.tell())


@contextmanager
def reading_errors(source: DataSource) -> Iterator[None]:
    """What the reading of a file raises, in our words."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(f"`{source.name}` is damaged: {error}", "download it again") from None
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
        if source.packed == ".gz":
            with gzip.GzipFile(fileobj=raw) as file:
                unpacked: Any = file
                yield unpacked, raw
        elif source.packed == ".zst":
            yield _zstandard(source, raw), raw
        else:
            yield raw, raw


def _zstandard(source: DataSource, raw: IO[bytes]) -> IO[bytes]:
    """The unpacked bytes of a .zst file, by pyarrow or the package `zstandard`."""
    try:
        import pyarrow as pa

        if pa.Codec.is_available("zstd"):
            return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))  # type: ignore[arg-type, return-value]
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise RequestError(f"`{source.name}` needs a library for .zst", "pip install zstandard") from None
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))  # type: ignore[no-any-return]


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


def lines_of(source: DataSource, file: IO[bytes], fault: Fault = refuse) -> Iterator[tuple[int, str]]:
    """(number, line) without the ends of lines. U+2028 ends none. A line that is not UTF-8 goes to `fault`."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        try:
            found = _line_of(source, number, line)
        except RequestError as error:
            if len(line) > LONGEST_LINE:  # the rest of it would be read as another line
                raise
            fault(error)
            continue
        yield number, found.rstrip("\r\n")


def _read_lines(source: DataSource, file: IO[bytes], fault: Fault) -> Iterator[tuple[int, Any]]:
    for number, line in lines_of(source, file, fault):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if HALF.search(line):
                _check_halves(row)
        except UnicodeEncodeError as error:
            fault(_half_a_character(source.where(number), error))
            continue
        except (ValueError, RecursionError) as error:
            why = "it holds NUL bytes" if "\0" in line else str(error)
            more = ", a list of them is .json" if line.strip() in "[{" else ""
            fault(
                RequestError(
                    f"`{source.name}:{number}` is not valid JSON: {why}",
                    f"each line is one JSON object{more}",
                )
            )
            continue
        yield number, row


def _check_halves(row: Any) -> None:
    """Raises UnicodeEncodeError for a text that holds half of a surrogate pair."""
    json.dumps(row, ensure_ascii=False).encode()


def _half_a_character(where: str, error: UnicodeEncodeError) -> RequestError:
    half = f"\\u{ord(error.object[error.start]):04x}"
    return RequestError(
        f"`{where}` holds half of a character, `{half}`", "write the whole character, or leave it out"
    )


def _read_list(source: DataSource, file: IO[bytes], fault: Fault) -> Iterator[tuple[int, Any]]:
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
        raise RequestError(
            f"`{source.name}` is not valid JSON: {error}", "one object a line is .jsonl"
        ) from None
    if isinstance(data, dict) and data.keys() & ROW_KEYS:  # one row
        data = [data]
    if isinstance(data, dict):  # {"data": [...]}, as some sets are
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else None
    if not isinstance(data, list):
        raise RequestError(f"`{source.name}` is not a list of examples")
    halves = HALF.search(raw.decode("utf-8-sig")) is not None
    for number, row in enumerate(data, 1):
        try:
            if halves:
                _check_halves(row)
        except UnicodeEncodeError as error:
            fault(_half_a_character(source.where(number), error))
            continue
        yield number, row


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
            f"`{source.name}` is damaged: {text[0][:160] if text else error}", "download it again"
        ) from None


def _read_hub(spec: str) -> Iterator[tuple[int, Any]]:
    """A hub set, `owner/name:config:split`; without a split `train`."""
    hub_reached()
    import datasets

    name, *rest = spec.split(":")
    datasets.disable_progress_bars()
    config = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else "train"
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the network and the builders each have kinds of their own
        text = str(error).splitlines()
        why = f"could not be downloaded from the Hub: {text[0][:200] if text else error}"
        if offline := why_offline():
            why = f"it is not in the local cache, and {offline}"
        raise RequestError(
            f"`{spec}` is not a file here, and {why}",
            "write it as owner/name, owner/name:split or owner/name:config:split",
        ) from None
    yield from enumerate(found, 1)


def find_sources(config: RunConfig, needed: bool = True) -> None:
    """Check that the data of a run are there: before anything is loaded. Without `needed`, there may be none.

    Raises RequestError as `sources` does, for data that are a model, and where a run names none.
    """
    if needed and not config.data and config.model != "demo":
        raise RequestError(f"`{config.model}` needs data to train on", "name a file with --data")
    model = Path(config.model).expanduser()
    for spec in config.data:
        name = weighted(spec)[0]
        swapped = model.is_file() and kind_of(model)[0] and _other_than_data(Path(name).expanduser())
        if swapped == "a model":
            raise RequestError(
                f"model and data are swapped: `{config.model}` is data, and `{name}` is a model",
                shlex.join(["lorafit", "train", name, "--data", config.model]),
            )
    find_files((*config.data, *config.eval_data))
    if config.chat_template:
        read_template(config.chat_template)


def find_files(specs: Iterable[str]) -> None:
    """Check that files of data are there. Raises RequestError as `sources` does."""
    for spec in specs:
        sources(weighted(spec)[0])
