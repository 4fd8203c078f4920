"""What lorafit keeps to be found again: folders that are whole, or not there.

Each kind has a folder of its own below the cache folder, and in it one folder an entry, by a key
that is a digest of all that decides its content. An entry is filled under a name of its own and
takes the one it is found by once it is whole; what a killed process left half filled is swept.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError
from lorafit.system import alive

KINDS = ("prefix", "rows")

# Kinds that are many small files, and what these are.
SMALL = {"maps": "models", "forecasts": "estimates", "digests": "weight files"}

INDEX, FILLING = "index.json", ".filling-"

JOURNAL = "journal.jsonl"  # in an entry that is filled: what is in it so far, where another process may go on

SILENT = 6 * 3600  # seconds without a change after which a folder that another host fills is taken for left

LEFT = 7 * 24 * 3600  # seconds that what a killed process left may be gone on with


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry on disk, as `lorafit cache` lists it."""

    key: str
    kind: str
    about: str
    tokens: int
    bytes: int
    made: float
    path: str


IMPORTS = re.compile(r"^\s*from lorafit((?:\.\w+)*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


@cache
def code_digest(*modules: str) -> str:
    """A digest of the source of these modules of lorafit and of all they import, directly or not: what was
    kept under another one was made by other code. It is read once in a process.

    Modules are named from within lorafit: `estimate.simulate`.
    """
    root = Path(__file__).parent
    seen: dict[Path, bytes] = {}
    wanted = [_source(root, name) for name in modules]
    while wanted:
        path = wanted.pop()
        if path is None or path in seen:
            continue
        seen[path] = path.read_bytes()
        for match in IMPORTS.finditer(seen[path].decode()):
            package = match[1].removeprefix(".")
            wanted.append(_source(root, package))
            names = [part.split(" as ")[0].strip() for part in match[2].strip("()").split(",")]
            wanted += [
                _source(root, f"{package}.{name}".lstrip(".")) for name in names if name.isidentifier()
            ]
    found = hashlib.sha256()
    for path in sorted(seen):
        found.update(str(path.relative_to(root)).encode() + seen[path])
    return found.hexdigest()


def _source(root: Path, name: str) -> Path | None:
    """The file of a module of lorafit; None where that name is not one."""
    path = root.joinpath(*name.split("."))
    choices = (path.with_suffix(".py"), path / "__init__.py")
    return next((choice for choice in choices if name and choice.is_file()), None)


def folder(kind: str) -> Path:
    """Where entries of that kind lie."""
    return cache_folder() / kind


def filling(entry: Path, taking_over: bool = False) -> Path:
    """The name under which this process fills an entry; its folder is made, killed ones are swept. With
    `taking_over` it is the folder of a killed process that filled the same entry, where there is one."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    beside = entry.with_name(f"{entry.name}{FILLING}{_host()}-{os.getpid()}")
    for left in entry.parent.glob(f"{entry.name}{FILLING}*") if taking_over and not beside.exists() else ():
        if _is_left(left):
            with suppress(OSError):  # another process was first
                left.rename(beside)
                break
    _sweep(entry.parent)
    beside.mkdir(exist_ok=True)
    return beside


def leave(beside: Path) -> None:
    """Leave a folder that is not whole to the next process that fills the same entry."""
    with suppress(OSError):  # another one is left already
        beside.rename(beside.with_name(f"{beside.name.partition(FILLING)[0]}{FILLING}left"))


def finish(beside: Path, entry: Path, index: dict[str, Any]) -> Path:
    """An entry is filled: its index is written, and it takes its name, unless another process was first. Where it lies
    now. No file in it may be open: Windows renames no folder then."""
    (beside / INDEX).write_text(json.dumps({**index, "made": time.time()}), encoding="utf-8")
    with suppress(
        OSError
    ):  # another process was first: its entry is the same, and this one goes once it is closed
        return beside.rename(entry)
    return beside


def index_of(entry: Path) -> dict[str, Any] | None:
    """What an entry says of itself; None where there is none, or it cannot be read."""
    try:
        found = json.loads((entry / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"*{FILLING}*"):
        if _is_left(path) and not _resumable(path):
            shutil.rmtree(path, ignore_errors=True)


@cache
def _host() -> str:
    """A short name for this host: several may share a cache folder, and do not see one another's processes."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _is_left(path: Path) -> bool:
    """Whether the process that filled that folder is gone; of another host, whether nothing was written for hours."""
    host, _, pid = path.name.rpartition(FILLING)[2].rpartition("-")
    if host in ("", _host()):
        return not pid.isdigit() or not alive(int(pid))
    with suppress(OSError):
        return time.time() - max(file.stat().st_mtime for file in (path, *path.iterdir())) > SILENT
    return False


def _resumable(path: Path) -> bool:
    """Whether another process may go on with what lies in that folder."""
    try:
        return time.time() - (path / JOURNAL).stat().st_mtime < LEFT
    except OSError:
        return False


def _about_left(path: Path) -> dict[str, Any] | None:
    """What the journal of a folder that is not whole says of it; None where no process may go on with it."""
    if not (_is_left(path) and _resumable(path)):
        return None
    try:
        lines = (path / JOURNAL).read_text(encoding="utf-8").splitlines()
        found = json.loads(lines[0])
        share = (len(lines) - 1) / found["expected"]
        made = (path / JOURNAL).stat().st_mtime
        return {**found, "about": f"{found['about']}, {share:.0%} filled", "made": made}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def kept() -> list[Stored]:
    """The entries on this machine, the newest first: whole ones, and those that another process may go on with."""
    found = []
    for kind in KINDS:
        for path in folder(kind).glob("*"):
            index = index_of(path) if FILLING not in path.name else _about_left(path)
            if index is None:
                continue
            with suppress(ValueError, TypeError):  # an index that was damaged
                found.append(
                    Stored(
                        path.name,
                        kind,
                        str(index.get("about", "")),
                        int(index.get("tokens", 0)),
                        sum(file.stat().st_size for file in path.iterdir()),
                        float(index.get("made", 0)),
                        str(path),
                    )
                )
    return sorted(found, key=lambda entry: -entry.made)


def small_kinds() -> list[Stored]:
    """What is kept in many small files, an entry for each kind: its key is the kind."""
    found = []
    for kind, about in SMALL.items():
        files = [path.stat() for path in folder(kind).glob("*.json")]
        if files:
            size, last = sum(file.st_size for file in files), max(file.st_mtime for file in files)
            found.append(Stored(kind, kind, f"{len(files):,} {about}", 0, size, last, str(folder(kind))))
    return found


def remove(key: str) -> int:
    """Remove the entry of that key, or the one whose key begins so; the bytes it held. Raises RequestError for none or
    several."""
    every = [*kept(), *small_kinds()]
    found = [entry for entry in every if entry.key == key] or [
        entry for entry in every if key and entry.key.startswith(key)
    ]
    if len(found) != 1:
        what = "no cache" if not found else f"{len(found)} caches"
        raise RequestError(f"{what} with a key that begins with `{key}`", "lorafit cache lists them")
    shutil.rmtree(found[0].path)
    return found[0].bytes


def remove_all() -> tuple[int, int]:
    """Remove every entry, and what killed processes left; (how many entries, the bytes in all)."""
    every = [*kept(), *small_kinds()]
    freed = sum(entry.bytes for entry in every)
    for entry in every:
        shutil.rmtree(entry.path)
    for kind in KINDS:
        for path in folder(kind).glob(f"*{FILLING}*"):
            if _is_left(path):
                freed += sum(file.stat().st_size for file in path.iterdir())
                shutil.rmtree(path, ignore_errors=True)
    return len(every), freed


def digest(raw: bytes | memoryview) -> str:
    """The digest that a piece of an entry is compared with before it is used."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def cache_folder() -> Path:
    """Where lorafit keeps what can be made again: `$XDG_CACHE_HOME/lorafit`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lorafit"
