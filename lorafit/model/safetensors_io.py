"""safetensors files read and written a few rows at a time, by ranges: no file is mapped or held whole.

The format (github.com/huggingface/safetensors, README): eight bytes of little-endian length, a
JSON header of name -> {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from lorafit.errors import RequestError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

PIECE = 2**20  # bytes read at a time: what is made of them stays in a core's cache


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: where its bytes are, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file by its header."""

    path: Path
    raw_header: bytes
    entries: tuple[TensorEntry, ...]  # in the order of their bytes

    @property
    def data_at(self) -> int:
        return 8 + len(self.raw_header)

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """One tensor, on the CPU."""
        with self.path.open("rb", buffering=0) as file:
            return _read(file, self.data_at + entry.start, entry.shape, entry.dtype)


def open_file(path: Path) -> TensorFile:
    """A file's header, checked: lengths and offsets must add up to the file's size.

    Raises RequestError when the file is cut short or is none of its kind.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise ValueError("its header is longer than the file")
            raw = file.read(length)
        header: dict[str, Any] = json.loads(raw)
        entries = []
        for name, row in header.items():
            if name == "__metadata__":
                continue
            start, stop = row["data_offsets"]
            entries.append(TensorEntry(name, row["dtype"], tuple(row["shape"]), start, stop))
        entries.sort(key=lambda e: (e.start, e.stop))
        end = max((e.stop for e in entries), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end:,} bytes and has {size:,}")
    except OSError as error:
        raise RequestError(f"cannot read `{path}`: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"`{path}` is damaged: {error}", "fetch the file anew") from None
    return TensorFile(path, raw, tuple(entries))


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the index's order; empty when it has none.

    Raises RequestError for an index that names files outside the folder or missing ones.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(table.values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RequestError(f"`{index}` is damaged: {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise RequestError(f"`{index}` names a file outside its folder: `{name}`")
        if not (folder / name).is_file():
            raise RequestError(f"`{index}` names `{name}`, which is not there", "fetch the file anew")
    return [folder / name for name in names]


SAMPLE = 64  # bytes of a tensor that are read at its start, its middle and its end


def fingerprint(place: str) -> str:
    """A digest of a model folder's weights: its headers, sizes, and samples of every tensor.

    Empty for what is no folder of safetensors files. Raises RequestError for a damaged file.
    """
    folder = Path(place)
    files = shards(folder) if folder.is_dir() else []
    if not files:
        return ""
    found = hashlib.sha256()
    for path in files:
        opened = open_file(path)
        found.update(opened.raw_header)
        with path.open("rb") as file:
            for entry in opened.entries:
                size = entry.stop - entry.start
                for at in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
                    file.seek(opened.data_at + entry.start + at)
                    found.update(file.read(min(SAMPLE, size)))
    return found.hexdigest()[:32]


Change = Callable[
    [torch.Tensor, int], torch.Tensor
]  # some rows of a tensor, the first one's number -> changed


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """A safetensors file as it is to be: its name, its header, what goes behind it in which order."""

    name: str
    raw_header: bytes
    pieces: tuple[tuple[TensorFile, TensorEntry, str], ...]  # from where, what, in which dtype

    @property
    def bytes(self) -> int:
        """Of the tensors, the header apart."""
        return sum(size_in(entry, dtype) for _, entry, dtype in self.pieces)


def size_in(entry: TensorEntry, dtype: str) -> int:
    """The bytes of a tensor once it is of that dtype."""
    return (entry.stop - entry.start) // DTYPES[entry.dtype].itemsize * DTYPES[dtype].itemsize


def lay_out(files: Sequence[TensorFile], dtype: str = "", limit: int = 0) -> list[ShardLayout]:
    """How the tensors of these files lie in new ones.

    As they lie now, header and all, unless a `dtype` is named that floating-point tensors are to have,
    or a `limit` of bytes for each file (a tensor that is larger has its own).
    """

    def kind(entry: TensorEntry) -> str:
        return dtype if dtype and DTYPES[entry.dtype].is_floating_point else entry.dtype

    if not dtype and not limit:
        return [
            ShardLayout(f.path.name, f.raw_header, tuple((f, e, e.dtype) for e in f.entries)) for f in files
        ]
    groups: list[list[tuple[TensorFile, TensorEntry, str]]] = [] if limit else [[] for _ in files]
    held = 0
    for number, file in enumerate(files):
        for entry in file.entries:
            size = size_in(entry, kind(entry))
            if limit:
                if not groups or held + size > limit:
                    groups.append([])
                    held = 0
                held += size
            groups[-1 if limit else number].append((file, entry, kind(entry)))
    names = [file.path.name for file in files]
    if limit:
        stem, end = SINGLE.split(".", 1)
        names = [f"{stem}-{n:05}-of-{len(groups):05}.{end}" for n in range(1, len(groups) + 1)]
        names = [SINGLE] if len(groups) == 1 else names
    metadata = json.loads(files[0].raw_header).get("__metadata__")
    return [
        ShardLayout(name, _header(group, metadata), tuple(group))
        for name, group in zip(names, groups, strict=True)
    ]


def _header(pieces: Sequence[tuple[TensorFile, TensorEntry, str]], metadata: Any) -> bytes:
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for _, entry, dtype in pieces:
        size = size_in(entry, dtype)
        table[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(table, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)  # the data begin at a multiple of eight


def write(
    sheets: Sequence[ShardLayout],
    folder: Path,
    changes: Mapping[str, Change],
    tick: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the files, their tensors changed on the way, a few rows at a time, several files at once:
    a file system lets one thread write a file.

    A change is given rows of a tensor as they are stored and gives back as many, in any float dtype:
    what it gives is rounded once, to the dtype the sheet names. It is called in several threads. `tick`
    hears of the bytes written. Raises OSError; the threads have ended then.
    """
    cores = torch.get_num_threads()
    workers = max(1, min(8, cores, len(sheets)))
    each = max(1, cores // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,))
    try:
        for done in as_completed(pool.submit(_write, sheet, folder, changes, tick) for sheet in sheets):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def _write(
    sheet: ShardLayout, folder: Path, changes: Mapping[str, Change], tick: Callable[[int], None]
) -> None:
    """One file, and to the disk with it."""
    with ExitStack() as opened:
        new = opened.enter_context((folder / sheet.name).open("wb", buffering=0))
        new.write(len(sheet.raw_header).to_bytes(8, "little") + sheet.raw_header)
        old: dict[Path, FileIO] = {}
        at = 8 + len(sheet.raw_header)
        for file, entry, dtype in sheet.pieces:
            if file.path not in old:
                old[file.path] = opened.enter_context(file.path.open("rb", buffering=0))
            source, begin, change = old[file.path], file.data_at + entry.start, changes.get(entry.name)
            if change is None and dtype == entry.dtype:
                at = _copy(source, begin, entry.stop - entry.start, new, at, tick)
            else:
                at = _rewrite(source, begin, entry, change, dtype, new, at, tick)
        os.fsync(new.fileno())


def _copy(source: FileIO, begin: int, size: int, new: FileIO, at: int, tick: Callable[[int], None]) -> int:
    """So many bytes from one file to another, within the system where it can; the place behind them."""
    end = begin + size
    within = hasattr(os, "copy_file_range")
    buffer = memoryview(b"")
    while begin < end:
        here = min(end - begin, 64 * PIECE)
        if within:
            try:
                done = os.copy_file_range(source.fileno(), new.fileno(), here, begin, at)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise
                done = 0
            within = done > 0  # not between these two file systems
        if not within:
            buffer = buffer or memoryview(bytearray(PIECE))
            part = buffer[: min(here, PIECE)]
            _fill(source, part, begin)
            _put(new, part, at)
            done = len(part)
        begin, at = begin + done, at + done
        tick(done)
    return at


def _rewrite(
    source: FileIO,
    begin: int,
    entry: TensorEntry,
    change: Change | None,
    dtype: str,
    new: FileIO,
    at: int,
    tick: Callable[[int], None],
) -> int:
    """One tensor, changed, from `begin` of a file to `at` of another; the place behind it."""
    rows = entry.shape[0] if entry.shape else 1
    width = (entry.stop - entry.start) // max(1, rows)
    for first, many in spans(rows if width else 0, PIECE // max(1, width)):
        shape = (many, *entry.shape[1:]) if entry.shape else ()
        block = _read(source, begin + first * width, shape, entry.dtype)
        changed = block if change is None else change(block, first)
        flat = changed.to(DTYPES[dtype]).contiguous().view(-1).view(torch.uint8)
        data = memoryview(flat.numpy().data)
        at = _put(new, data, at)
        tick(len(data))
    return at


def _read(source: FileIO, begin: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """The tensor that begins there in a file."""
    found = torch.empty(shape, dtype=DTYPES[dtype])
    _fill(source, found.view(-1).view(torch.uint8).numpy().data, begin)
    return found


def _fill(source: FileIO, part: memoryview, begin: int) -> None:
    """Read as many bytes as there is room for: the system gives at most 2 GiB at once.

    Raises OSError when the file ends before.
    """
    while part:
        got = os.preadv(source.fileno(), [part], begin)
        if not got:
            raise OSError(errno.EIO, f"{source.name} became shorter while it was read")
        part, begin = part[got:], begin + got


def _put(new: FileIO, data: memoryview, at: int) -> int:
    """Write the bytes there; the place behind them."""
    while data:
        done = os.pwrite(new.fileno(), data, at)
        data, at = data[done:], at + done
    return at


def spans(rows: int, many: int) -> Iterator[tuple[int, int]]:
    """(first, how many) of about `many` rows each, in multiples of 64 and none of fewer: on blocks
    like these matrix kernels do what they do on the whole, to the bit."""
    step, first = max(64, many // 64 * 64), 0
    while first < rows:
        here = rows - first if rows - first < step + 64 else step
        yield first, here
        first += here
