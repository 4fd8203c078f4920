"""Where the hidden states that enter the cut are kept: in memory, or in a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lorafit import __version__, cache
from lorafit.system import installed, read_at

FORMAT = 3

STATES = "states.bin"


class StateStore(Protocol):
    """Hidden states by the key of their micro-batch."""

    @property
    def proved(self) -> bool:
        """Whether what is stored may be used: it was made here, or a state that was made again is the same."""
        ...

    def has(self, key: str) -> bool: ...

    def get(self, key: str) -> torch.Tensor | None: ...

    def put(self, key: str, state: torch.Tensor) -> None:
        """Raises OSError where the disk is full."""
        ...

    def filled(self) -> None:
        """All states that will be asked for are there."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class MemoryStore:
    """In the host's memory. Those of a GPU lie in one pinned piece of `room` bytes, so that no copy, there or
    back, is waited for: a GPU does its copies and products in the order they were asked for."""

    room: int = 0
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    pinned: torch.Tensor | None = None
    used: int = 0

    @property
    def proved(self) -> bool:
        return True

    def has(self, key: str) -> bool:
        return key in self.states

    def get(self, key: str) -> torch.Tensor | None:
        return self.states.get(key)

    def put(self, key: str, state: torch.Tensor) -> None:
        self.states[key] = self._place_for(state).copy_(state, non_blocking=True) if state.is_cuda else state

    def _place_for(self, state: torch.Tensor) -> torch.Tensor:
        """Pinned memory for a state: the next free part of the piece, or, where that is full, its own."""
        size = state.nbytes
        if self.pinned is None:
            self.pinned = torch.empty(self.room, dtype=torch.uint8, pin_memory=True)
        if self.used + size > self.room:
            return torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
        part = self.pinned[self.used : self.used + size]
        self.used += size
        return part.view(state.dtype).view(state.shape)

    def filled(self) -> None:
        """Nothing more to do: what lies in memory is whole at any time."""

    def close(self) -> None:
        self.states.clear()
        self.pinned, self.used = None, 0


@dataclass(slots=True)
class DiskStore:
    """In a folder: `states.bin`, one state after another, and `index.json` that says where each lies.

    While it is filled it has a name of its own, and a journal in place of the index: what a killed process left
    is taken over, so far as its digests are right. It takes the name it is found by once all `expected`
    states are there: a folder of that name is whole. Each state is compared with its digest when it is first
    read; one that differs counts as not there, and the folder goes in the end.

    Of a folder that was found, or taken over, nothing counts as there before one state that was made again
    (`put`) is the same as the one that is stored; where they differ nothing stored is used.
    """

    folder: Path
    expected: frozenset[str]
    about: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    known_good: set[str] = field(default_factory=set)
    damaged: bool = False  # a state has another digest than its own
    whole: bool = False
    proved: bool = True  # made here, or one of its states compared with a fresh pass
    keeps: bool = True  # what is not whole is left for another process to go on with
    filling: Path | None = None
    double: Path | None = None  # where it is whole, and another process has filled the same entry before
    file: Any = None

    def __post_init__(self) -> None:
        found = _index(self.folder)
        if found is not None and set(found["entries"]) == self.expected:
            self.entries, self.whole, self.proved = found["entries"], True, False
            self.file = (self.folder / STATES).open("rb")
            return
        self._begin()

    def _begin(self) -> None:
        """Fill it, from what a killed process left on; what stands under its name is not whole, or wrong."""
        if self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.filling = cache.filling(self.folder, taking_over=True)
        path = self.filling / STATES
        path.touch()
        self.file = path.open("r+b")
        self.entries = _journalled(self.filling, self.expected)
        self.known_good = set(self.entries)
        self.whole, self.proved = False, not self.entries
        if self.proved:
            self.file.truncate()
            self._note({**self.about, "format": FORMAT, "expected": len(self.expected)}, "w")

    def _note(self, line: dict[str, Any], mode: str = "a") -> None:
        """A line of the journal."""
        assert self.filling is not None
        with (self.filling / cache.JOURNAL).open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, key: str) -> bool:
        return self.proved and key in self.entries

    def get(self, key: str) -> torch.Tensor | None:
        if not self.proved:
            return None
        return self._read(key)

    def _read(self, key: str) -> torch.Tensor | None:
        entry = self.entries.get(key)
        if entry is None:
            return None
        # pinned where a GPU reads it: its copy there needs no wait
        raw = torch.empty(entry["bytes"], dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        view = raw.numpy().data
        done = 0
        while done < len(view):  # the system gives at most 2 GiB at once
            got = read_at(self.file, view[done:], entry["offset"] + done)
            if not got:
                return None
            done += got
        if key not in self.known_good:
            if cache.digest(view) != entry["digest"]:
                self.damaged = True
                return None
            self.known_good.add(key)
        return raw.view(getattr(torch, entry["dtype"])).view(entry["shape"])

    def put(self, key: str, state: torch.Tensor) -> None:
        if not self.proved:
            stored = self._read(key)
            self.proved = stored is not None and same_state(stored, state.cpu())
            if self.proved:
                return
            self._forget()
            self._begin()
        if key in self.entries:
            return
        raw = bytes(state.cpu().contiguous().view(torch.uint8).numpy().data)
        offset = self.file.seek(0, os.SEEK_END)
        self.file.write(raw)
        self.file.flush()
        self.entries[key] = {
            "offset": offset,
            "bytes": len(raw),
            "shape": list(state.shape),
            "dtype": str(state.dtype).removeprefix("torch."),
            "digest": cache.digest(raw),
        }
        self._note({"key": key, **self.entries[key]})
        self.known_good.add(key)
        if set(self.entries) == self.expected:
            self._finish()

    def _finish(self) -> None:
        os.fsync(self.file.fileno())
        size = self.file.seek(0, os.SEEK_END)
        index = {**self.about, "format": FORMAT, "bytes": size, "entries": self.entries}
        assert self.filling is not None
        (self.filling / cache.JOURNAL).unlink()
        self.file.close()
        place = cache.finish(self.filling, self.folder, index)
        self.file = (place / STATES).open("rb")
        self.whole, self.filling, self.double = True, None, None if place == self.folder else place

    def filled(self) -> None:
        self.keeps = False

    def _forget(self) -> None:
        """Remove what is stored."""
        try:
            self.file.close()
        finally:  # on a full disk what is still to be written fails once more
            shutil.rmtree(self.filling or self.folder, ignore_errors=True)

    def close(self) -> None:
        """What is not whole is left to be gone on with, where it lacks what the run needs; else it goes, and so
        does a cache in which a state was damaged."""
        if self.damaged or (self.filling is not None and not (self.keeps and self.entries)):
            self._forget()
        elif self.filling is not None:
            try:
                self.file.close()
            finally:
                cache.leave(self.filling)
        self.file.close()
        if self.double is not None:
            shutil.rmtree(self.double, ignore_errors=True)


def same_state(stored: torch.Tensor, fresh: torch.Tensor) -> bool:
    """Whether two states are one but for rounding: another number of threads sums in another order.

    Their difference, as a share of the state's norm, is at most 64 spacings of the dtype, and 5 %.
    """
    if stored.shape != fresh.shape or stored.dtype != fresh.dtype:
        return False
    apart = (stored.double() - fresh.double()).norm()
    allowed = min(0.05, 64 * torch.finfo(fresh.dtype).eps) * fresh.double().norm()
    return bool(apart <= allowed)


def _journalled(filling: Path, expected: frozenset[str]) -> dict[str, dict[str, Any]]:
    """What a killed process stored, by its journal: the entries whose bytes are all there and have their
    digest."""
    entries: dict[str, dict[str, Any]] = {}
    try:
        lines = (filling / cache.JOURNAL).read_text(encoding="utf-8").splitlines()
        if json.loads(lines[0]).get("format") != FORMAT:
            return {}
        with (filling / STATES).open("rb") as file:
            for line in lines[1:]:
                entry = json.loads(line)
                key = entry.pop("key")
                file.seek(entry["offset"])
                raw = file.read(entry["bytes"])
                if key in expected and cache.digest(raw) == entry["digest"]:
                    entries[key] = entry
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        pass  # the rest of it is not readable: what came before is
    return entries


def _index(entry: Path) -> dict[str, Any] | None:
    """What a cache says of itself; None where there is none or its file is not as long as it says."""
    found = cache.index_of(entry) or {}
    try:
        size = (entry / STATES).stat().st_size
    except OSError:
        return None
    good = (
        found.get("format") == FORMAT
        and found.get("bytes") == size
        and isinstance(found.get("entries"), dict)
    )
    return found if good else None


def states_folder() -> Path:
    """Where the caches lie."""
    return cache.folder("prefix")


def states_key(base: torch.nn.Module, stack: str, cut: int, rows: Iterable[str], weights: str) -> str:
    """A digest of all that decides the states: the base's weights and how they are quantised, the micro-batches'
    tokens, the cut, dtype, device, attention, and the versions of what computes them.

    `weights` is the identity of the base's files (model.identity.fingerprint). Raises ValueError without one.
    """
    if not weights:
        raise ValueError("states can be kept for weights whose identity is known alone")
    first = next(base.parameters())
    config: Any = base.config
    facts = [
        FORMAT, __version__, installed("torch"), installed("transformers"), stack, cut, str(first.dtype),
        first.device.type, getattr(config, "_attn_implementation", ""), type(base).__name__, weights,
    ]  # fmt: skip
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    if "quantization_config" in settings:
        facts.append(installed("bitsandbytes"))
    found = hashlib.sha256(json.dumps([*facts, settings], sort_keys=True, default=str).encode())
    for row in rows:
        found.update(row.encode())
    return found.hexdigest()[:32]
