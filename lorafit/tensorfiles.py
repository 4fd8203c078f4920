"""safetensors files read and written one tensor at a time, by ranges: no file is mapped or held whole.

The format (github.com/huggingface/safetensors, README): eight bytes of little-endian length, a
JSON header of name -> {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
PIECE = 16 * 2**20  # bytes copied at a time


@dataclass(frozen=True, slots=True)
class Entry:
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
    entries: tuple[Entry, ...]  # in the order of their bytes

    @property
    def data_at(self) -> int:
        return 8 + len(self.raw_header)

    def read(self, entry: Entry) -> torch.Tensor:
        """One tensor, on the CPU."""
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        with self.path.open("rb") as file:
            file.seek(self.data_at + entry.start)
            data = bytearray(file.read(entry.stop - entry.start))
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


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
            entries.append(Entry(name, row["dtype"], tuple(row["shape"]), start, stop))
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


def rewrite(
    source: TensorFile,
    target: Path,
    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    tick: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the file anew with some tensors changed, header and layout as they were.

    A change returns a tensor of the same shape and dtype; `tick` hears of the bytes written.
    """
    with source.path.open("rb") as old, target.open("wb") as new:
        new.write(len(source.raw_header).to_bytes(8, "little") + source.raw_header)
        for entry in source.entries:
            change = changes.get(entry.name)
            if change is None:
                old.seek(source.data_at + entry.start)
                left = entry.stop - entry.start
                while left:
                    piece = old.read(min(PIECE, left))
                    new.write(piece)
                    left -= len(piece)
            else:
                changed = change(source.read(entry)).contiguous()
                new.write(changed.view(torch.uint8).reshape(-1).numpy().data)
            tick(entry.stop - entry.start)
        new.flush()
        os.fsync(new.fileno())
