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
from lorafit.system import installed

FORMAT = 1


class StateStore(Protocol):
    """Hidden states by the key of their micro-batch."""

    def get(self, key: str) -> torch.Tensor | None: ...

    def put(self, key: str, state: torch.Tensor) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class MemoryStore:
    """In the host's memory; pinned where a GPU reads it."""

    states: dict[str, torch.Tensor] = field(default_factory=dict)

    def get(self, key: str) -> torch.Tensor | None:
        return self.states.get(key)

    def put(self, key: str, state: torch.Tensor) -> None:
        self.states[key] = state.cpu().pin_memory() if state.is_cuda else state

    def close(self) -> None:
        self.states.clear()


@dataclass(slots=True)
class DiskStore:
    """In a folder: `states.bin`, one state after another, and `index.json` that says where each lies.

    While it is filled it has a name of its own, and takes the one it is found by once all
    `expected` states are there: a folder of that name is whole. Each state is held against its
    digest when it is first read; one that differs counts as not there, and is made again.
    """

    folder: Path
    expected: frozenset[str]
    about: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    known_good: set[str] = field(default_factory=set)
    made_again: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: bool = False
    filling: Path | None = None
    file: Any = None

    def __post_init__(self) -> None:
        found = _index(self.folder)
        if found is not None and set(found["entries"]) == self.expected:
            self.entries, self.whole = found["entries"], True
            self.file = (self.folder / "states.bin").open("rb")
            return
        if self.folder.exists():  # of that name, and not whole: damaged
            shutil.rmtree(self.folder, ignore_errors=True)
        self.filling = cache.filling(self.folder)
        self.file = (self.filling / "states.bin").open("w+b")

    def get(self, key: str) -> torch.Tensor | None:
        entry = self.entries.get(key)
        if key in self.made_again:
            return self.made_again[key]
        if entry is None:
            return None
        raw = os.pread(self.file.fileno(), entry["bytes"], entry["offset"])
        if key not in self.known_good:
            if cache.digest(raw) != entry["digest"]:
                return None
            self.known_good.add(key)
        dtype = getattr(torch, entry["dtype"])
        return torch.frombuffer(bytearray(raw), dtype=dtype).view(entry["shape"])

    def put(self, key: str, state: torch.Tensor) -> None:
        """Raises OSError where the disk is full."""
        if self.whole:  # the stored one was damaged
            self.made_again[key] = state.cpu()
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
        self.known_good.add(key)
        if set(self.entries) == self.expected:
            self._finish()

    def _finish(self) -> None:
        os.fsync(self.file.fileno())
        size = self.file.seek(0, os.SEEK_END)
        index = {**self.about, "format": FORMAT, "bytes": size, "entries": self.entries}
        assert self.filling is not None
        cache.finish(self.filling, self.folder, index)
        self.whole = True

    def close(self) -> None:
        """A cache that is not whole, or in which a state was damaged, is removed."""
        self.file.close()
        if self.filling is not None:
            shutil.rmtree(self.filling, ignore_errors=True)
        if self.made_again:
            shutil.rmtree(self.folder, ignore_errors=True)


def _index(entry: Path) -> dict[str, Any] | None:
    """What a cache says of itself; None where there is none or its file is not as long as it says."""
    found = cache.index_of(entry) or {}
    try:
        size = (entry / "states.bin").stat().st_size
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


def states_key(base: torch.nn.Module, stack: str, cut: int, rows: Iterable[str]) -> str:
    """A digest of all that decides the states: the weights below the cut, the micro-batches'
    tokens, the cut, dtype, device, attention, and the versions of what computes them.

    Of each weight the name, shape, dtype and up to 1,024 values spread over it are taken.
    """
    found = hashlib.sha256()
    first = next(base.parameters())
    config: Any = base.config
    facts = [
        FORMAT, __version__, installed("torch"), installed("transformers"), stack, cut, str(first.dtype),
        first.device.type, getattr(config, "_attn_implementation", ""), type(base).__name__,
    ]  # fmt: skip
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    found.update(json.dumps([*facts, settings], sort_keys=True, default=str).encode())
    depth = len(list(base.get_submodule(stack).children()))
    above = tuple(f"{stack}.{layer}." for layer in range(cut, depth))
    for name, parameter in base.named_parameters():
        if name.startswith(above) or "lora_" in name:
            continue
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // 1024)][:1025].float().cpu()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(values.numpy().tobytes())
    for row in rows:
        found.update(row.encode())
    return found.hexdigest()[:32]
