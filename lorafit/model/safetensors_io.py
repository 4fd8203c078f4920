"""safetensors files read and written a few rows at a time, by ranges: no file is mapped or held whole.

The format (github.com/huggingface/safetensors, README): eight bytes of little-endian length, a
JSON header of name -> {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import errno
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

from lorafit.model.headers import SINGLE, TensorEntry, TensorFile
from lorafit.system import read_at, write_at

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

FULL = {errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}

PIECE = 2**20  # bytes read at a time: what is made of them stays in a core's cache


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


def lay_out(
    files: Sequence[TensorFile], dtype: str = "", limit: int = 0, headed: bool = False
) -> list[ShardLayout]:
    """How the tensors of these files lie in new ones.

    As they lie now, header and all, unless a `dtype` is named that floating-point tensors are to have,
    or a `limit` of bytes for each file (a tensor that is larger has its own).
    """

    def kind(entry: TensorEntry) -> str:
        return dtype if dtype and DTYPES[entry.dtype].is_floating_point else entry.dtype

    if not dtype and not limit and not headed:
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
    what it gives is rounded once, to the dtype that the layout names. It is called in several threads. `tick`
    is called with the bytes written. Raises OSError; the threads have ended then.
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
    within_system = getattr(os, "copy_file_range", None)
    within = within_system is not None
    buffer = memoryview(b"")
    while begin < end:
        here = min(end - begin, 64 * PIECE)
        if within and within_system is not None:
            try:
                done = within_system(source.fileno(), new.fileno(), here, begin, at)
            except OSError as error:
                if error.errno in FULL:
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
        block = read_range(source, begin + first * width, shape, entry.dtype)
        changed = block if change is None else change(block, first)
        flat = changed.to(DTYPES[dtype]).contiguous().view(-1).view(torch.uint8)
        data = memoryview(flat.numpy().data)
        at = _put(new, data, at)
        tick(len(data))
    return at


def read_tensor(file: TensorFile, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file, on the CPU."""
    with file.path.open("rb", buffering=0) as source:
        return read_range(source, file.data_at + entry.start, entry.shape, entry.dtype)


def read_rows(file: TensorFile, name: str, first: int, many: int) -> torch.Tensor:
    """Some rows of one tensor of a file, on the CPU."""
    return rows_of(file, next(entry for entry in file.entries if entry.name == name), first, many)


def rows_of(file: TensorFile, entry: TensorEntry, first: int, many: int) -> torch.Tensor:
    """Some rows of one tensor of a file, on the CPU."""
    width = (entry.stop - entry.start) // max(1, entry.shape[0])
    with file.path.open("rb", buffering=0) as source:
        begin = file.data_at + entry.start + first * width
        return read_range(source, begin, (many, *entry.shape[1:]), entry.dtype)


def read_range(source: FileIO, begin: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """The tensor that begins there in a file."""
    found = torch.empty(shape, dtype=DTYPES[dtype])
    _fill(source, found.view(-1).view(torch.uint8).numpy().data, begin)
    return found


def _fill(source: FileIO, part: memoryview, begin: int) -> None:
    """Read as many bytes as there is room for: the system gives at most 2 GiB at once.

    Raises OSError when the file ends before.
    """
    while part:
        got = read_at(source, part, begin)
        if not got:
            raise OSError(errno.EIO, f"{source.name} became shorter while it was read")
        part, begin = part[got:], begin + got


def _put(new: FileIO, data: memoryview, at: int) -> int:
    """Write the bytes there; the place behind them."""
    while data:
        done = write_at(new, data, at)
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
