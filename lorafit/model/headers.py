"""The headers of a model's weight files: names, dtypes and shapes of every tensor, without torch.

The format (github.com/huggingface/safetensors, README): eight bytes of little-endian length, a
JSON header of name -> {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import RequestError

if TYPE_CHECKING:
    pass

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}  # what weights are trained in


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


def open_file(path: Path) -> TensorFile:
    """A file's header, checked: lengths and offsets must add up to the file's size.

    Raises RequestError when the file is cut short or is not a safetensors file.
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
        raise RequestError(f"`{path}` is damaged: {error}", "download it again") from None
    return TensorFile(path, raw, tuple(entries))


class NotThere(RequestError):
    """An index names a file that is not in its folder."""


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the index's order; empty when it has none.

    One whole file is taken before an index, as transformers takes it: an index beside it is left of other files.
    Raises RequestError for an index that names files outside the folder or missing ones.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        return []
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(table.values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RequestError(f"`{index}` is damaged: {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise RequestError(f"`{index}` names a file outside its folder: `{name}`")
        if not (folder / name).is_file():
            raise NotThere(f"`{index}` names `{name}`, which is not there", "download it again")
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder's safetensors files, by name; empty when it has none.

    Raises RequestError for a damaged file.
    """
    return {entry.name: entry for path in shards(folder) for entry in open_file(path).entries}


def dtype_of(entries: Iterable[TensorEntry]) -> str:
    """The dtype that most bytes of floating-point tensors have, as torch names it; empty without any."""
    found: Counter[str] = Counter()
    for entry in entries:
        if entry.dtype in FLOATS:
            found[FLOATS[entry.dtype]] += entry.stop - entry.start
    return found.most_common(1)[0][0] if found else ""
