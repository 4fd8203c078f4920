"""Token rows in flat arrays, in memory or mapped from disk: two million rows take no more than their ids.

Arrays of a store of R rows: `ids` (sum of lengths) and `labels` int32, their starts (R + 1) int64, `weights`
(the labels of rows whose labels do not all count 1) float32 and their starts (R + 1) int64,
each row's place in its file and its example (R) int64, its group and a digest of its content (R) uint64,
and flags (R) uint8.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from lorafit.cache import index_of

IGNORED = -100  # the label of a token that is read, not learned

CUT, NO_END = 1, 2  # flags: the row was cut to length; what is learned of it ends with no end token

FORMAT = 3

ARRAYS = {
    "ids": np.int32, "labels": np.int32, "weights": np.float32, "starts": np.int64, "label_starts": np.int64,
    "weight_starts": np.int64, "numbers": np.int64, "examples": np.int64, "groups": np.uint64,
    "contents": np.uint64, "flags": np.uint8,
}  # fmt: skip

TYPES = {np.int32: "i", np.int64: "q", np.uint64: "Q", np.uint8: "B", np.float32: "f"}

FLUSHED = 1 << 20  # items of an array that is written out bit by bit


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `ids` enter the model; `labels` are the ids to be learned, IGNORED elsewhere.

    For causal and masked models both have one length, and labels stand at their own token; for
    sequence-to-sequence `ids` are the encoder's and `labels` the decoder's.
    `prompt` is the number of leading ids before the first that is learned; `number` and `example`
    say which row of the file it was read from, and which of its examples. Rows of one `group` are held out
    together; 0 is none. `weights` are what each label counts in the loss; empty where each counts 1.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str
    number: int = 0
    example: int = 0
    flags: int = 0
    group: int = 0
    weights: tuple[float, ...] = ()

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    @property
    def weight(self) -> float:
        """What the row counts in the loss: the sum of its learned labels' weights."""
        if not self.weights:
            return float(self.supervised)
        return sum(w for w, label in zip(self.weights, self.labels, strict=True) if label != IGNORED)

    @property
    def prompt(self) -> int:
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


@dataclass(frozen=True)
class RowStore:
    """Rows of one file. `name` and `by_line` say where each was read."""

    name: str
    by_line: bool
    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays["flags"])

    def where(self, row: int) -> str:
        number = int(self.arrays["numbers"][row])
        return f"{self.name}:{number}" if self.by_line else f"{self.name}[{number}]"

    def ids(self, row: int) -> np.ndarray:
        starts = self.arrays["starts"]
        return self.arrays["ids"][starts[row] : starts[row + 1]]

    def labels(self, row: int) -> np.ndarray:
        starts = self.arrays["label_starts"]
        return self.arrays["labels"][starts[row] : starts[row + 1]]

    def weights(self, row: int) -> np.ndarray:
        starts = self.arrays["weight_starts"]
        return self.arrays["weights"][starts[row] : starts[row + 1]]

    def row(self, row: int) -> Row:
        return Row(
            tuple(self.ids(row).tolist()),
            tuple(self.labels(row).tolist()),
            self.where(row),
            int(self.arrays["numbers"][row]),
            int(self.arrays["examples"][row]),
            int(self.arrays["flags"][row]),
            int(self.arrays["groups"][row]),
            tuple(self.weights(row).tolist()),
        )


class Writer:
    """Rows into a store: in memory, or in the files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.parts = {name: array(TYPES[kind]) for name, kind in ARRAYS.items()}
        self.starts = {"ids": "starts", "labels": "label_starts", "weights": "weight_starts"}
        for start in self.starts.values():
            self.parts[start].append(0)
        self.at = dict.fromkeys(self.starts, 0)
        self.digests = {name: hashlib.blake2b(digest_size=16) for name in ARRAYS}
        self.files: dict[str, BinaryIO] = {}
        if folder is not None:
            self.files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}

    def add(self, row: Row) -> None:
        """Raises OSError where the disk is full."""
        parts = self.parts
        of_row: dict[str, array[Any]] = {
            "ids": array("i", row.ids), "labels": array("i", row.labels), "weights": array("f", row.weights)
        }  # fmt: skip
        content = hashlib.blake2b(digest_size=8)
        for name, values in of_row.items():
            parts[name].extend(values)
            self.at[name] += len(values)
            parts[self.starts[name]].append(self.at[name])
            content.update(values.tobytes())
        parts["numbers"].append(row.number)
        parts["examples"].append(row.example)
        parts["groups"].append(row.group)
        parts["contents"].append(int.from_bytes(content.digest(), "little"))
        parts["flags"].append(row.flags)
        if self.files and len(parts["ids"]) > FLUSHED:
            self._flush()

    def _flush(self) -> None:
        for name, file in self.files.items():
            raw = self.parts[name].tobytes()
            self.digests[name].update(raw)
            file.write(raw)
            del self.parts[name][:]

    def finish(self) -> dict[str, np.ndarray] | dict[str, str]:
        """The arrays; of a folder, the digests of its files."""
        if not self.files:
            return {name: np.array(self.parts[name], dtype=kind) for name, kind in ARRAYS.items()}
        self._flush()
        self.close()
        return {name: found.hexdigest() for name, found in self.digests.items()}

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def opened(entry: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays of a stored entry, mapped, and its index; None where there is none, or one that
    differs from what was written: that one is removed."""
    index = index_of(entry)
    if index is None:
        return None
    if index.get("format") == FORMAT and isinstance(index.get("digests"), dict):
        try:
            if all(_digest_of(entry / f"{n}.bin") == index["digests"].get(n) for n in ARRAYS):
                return {n: _mapped(entry / f"{n}.bin", kind) for n, kind in ARRAYS.items()}, index
        except OSError:  # a file of it is missing: as good as none
            pass
    shutil.rmtree(entry, ignore_errors=True)
    return None


def _mapped(path: Path, kind: Any) -> np.ndarray:
    return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.empty(0, dtype=kind)


def _digest_of(path: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


@dataclass(frozen=True)
class RowSet(Sequence[Row]):
    """Rows of several stores, in an order, some more than once: `index` holds numbers over all stores."""

    stores: tuple[RowStore, ...]
    index: np.ndarray = field(repr=False)  # type: ignore[assignment]  # a sequence's own `index` is not used

    @staticmethod
    def of(rows: Iterable[Row]) -> RowSet:
        """Rows that are at hand, as a set of one store."""
        rows = list(rows)
        writer = Writer()
        for row in rows:
            writer.add(row)
        store = _Named("", False, writer.finish(), tuple(row.where for row in rows))  # type: ignore[arg-type]
        return RowSet((store,), np.arange(len(rows)))

    @cached_property
    def _bases(self) -> np.ndarray:
        return np.cumsum([0, *(len(store) for store in self.stores)])

    def found(self, number: int) -> tuple[RowStore, int]:
        """The store of a row, and its number there."""
        place = int(np.searchsorted(self._bases, number, side="right")) - 1
        return self.stores[place], int(number - self._bases[place])

    def __len__(self) -> int:
        return len(self.index)

    def origins(self) -> Iterator[tuple[str, int]]:
        """(name of its source, its number there) of each row."""
        for number in self.index:
            store, row = self.found(number)
            yield store.name, int(store.arrays["numbers"][row])

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, key: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(key, slice):
            return tuple(self[n] for n in range(*key.indices(len(self))))
        store, row = self.found(self.index[key])
        return store.row(row)

    def __iter__(self) -> Iterator[Row]:
        return (self[n] for n in range(len(self)))

    def _all(self, values: Any) -> np.ndarray:
        """A value of each row: `values(store)` are those of a store."""
        whole = [values(store) for store in self.stores]
        return np.concatenate(whole)[self.index] if whole else np.empty(0, dtype=np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens that enter the model."""
        return self._all(lambda store: np.diff(store.arrays["starts"]))

    @cached_property
    def target_lengths(self) -> np.ndarray:
        """(rows,) labels, learned or not."""
        return self._all(lambda store: np.diff(store.arrays["label_starts"]))

    @cached_property
    def supervised(self) -> int:
        """Labels that are learned, over all rows."""
        return int(self._all(_learned).sum())

    @cached_property
    def weight(self) -> float:
        """What the rows count in the loss: the sum of their learned labels' weights."""
        return float(self._all(_weights).sum())

    @property
    def contents(self) -> np.ndarray:
        """(rows,) a digest of each row's ids, labels and weights."""
        return self._all(lambda store: store.arrays["contents"])

    @property
    def flags(self) -> np.ndarray:
        """(rows,) CUT and NO_END."""
        return self._all(lambda store: store.arrays["flags"])

    @cached_property
    def digest(self) -> str:
        """The same rows in the same order have the same one."""
        return hashlib.sha256(np.ascontiguousarray(self.contents).tobytes()).hexdigest()[:32]


def save_rows(rows: RowSet, path: Path) -> None:
    """Write rows into one safetensors file, to be read back by `read_rows`: their arrays, and by number the
    source of each. Files are named by their full path. Raises OSError where the disk is full.
    """
    from safetensors.numpy import save

    writer, sources, homes = Writer(), dict[tuple[str, bool], int](), array("q")
    for number in rows.index:
        store, row = rows.found(number)
        place = Path(store.name).expanduser()
        name = str(place.resolve()) if store.name and place.exists() else store.name
        homes.append(sources.setdefault((name, store.by_line), len(sources)))
        writer.add(store.row(row))
    arrays = {name: np.asarray(made) for name, made in writer.finish().items()}
    about = {"format": str(FORMAT), "sources": json.dumps(list(sources))}
    beside = path.with_name(f".{path.name}")
    # not save_file: safetensors 0.8 writes files that their owner alone can read
    beside.write_bytes(save({**arrays, "homes": np.array(homes, dtype=np.int64)}, about))
    beside.replace(path)


def read_rows(path: Path) -> RowSet:
    """The rows that `save_rows` wrote. Raises ValueError, OSError or SafetensorError for what is not such a
    file, or one of another version."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        about = file.metadata() or {}
        if about.get("format") != str(FORMAT):
            raise ValueError(f"its rows are of format {about.get('format')}, not {FORMAT}")
        arrays = {name: file.get_tensor(name) for name in (*ARRAYS, "homes")}
    homes, whole = arrays.pop("homes"), RowStore("", False, arrays)
    stores, index, before = [], np.empty(len(homes), dtype=np.int64), 0
    for home, (name, by_line) in enumerate(json.loads(about["sources"])):
        own, writer = np.flatnonzero(homes == home), Writer()
        for row in own:
            writer.add(whole.row(int(row)))
        stores.append(RowStore(name, by_line, {n: np.asarray(made) for n, made in writer.finish().items()}))
        index[own] = np.arange(len(own)) + before
        before += len(own)
    return RowSet(tuple(stores), index)


def _learned(store: RowStore) -> np.ndarray:
    """(rows,) of a store: the labels of each that are learned; a million labels at a time."""
    starts, labels = store.arrays["label_starts"], store.arrays["labels"]
    found = np.zeros(len(store), dtype=np.int64)
    at = 0
    while at < len(store):
        stop = max(at + 1, int(np.searchsorted(starts, starts[at] + FLUSHED, side="right")) - 1)
        piece = labels[starts[at] : starts[stop]] != IGNORED
        sums = np.concatenate([[0], np.cumsum(piece)])
        found[at:stop] = np.diff(sums[starts[at : stop + 1] - starts[at]])
        at = stop
    return found


def _weights(store: RowStore) -> np.ndarray:
    """(rows,) of a store: the sum of each row's learned labels' weights, float64."""
    found = _learned(store).astype(np.float64)
    for row in np.flatnonzero(np.diff(store.arrays["weight_starts"])).tolist():
        found[row] = store.weights(row)[store.labels(row) != IGNORED].sum(dtype=np.float64)
    return found


@dataclass(frozen=True)
class _Named(RowStore):
    """Rows whose places are given one by one."""

    places: tuple[str, ...] = ()

    def where(self, row: int) -> str:
        return self.places[row]
