"""What lorafit wrote, by its digests: a flipped bit is found before a file is used, and a file that lorafit
did not write is recognised before it is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorafit.cache import cache_folder
from lorafit.errors import RequestError
from lorafit.jsonio import keep

SEAL = "digests.json"

KNOWN = "digests"  # where in the cache folder the digests of large files are kept

SETTLED = 0.05  # seconds: a file changed later than so before it was read may change within the same tick


def seal(folder: Path, but: tuple[str, ...] = ()) -> None:
    """Write the SHA-256 of every file of a folder into `digests.json`.

    Files named in `but` are left out, and so are sub-folders that have digests of their own.
    """
    found = {name: _digest(folder / name) for name in sorted(_files(folder)) if name not in (SEAL, *but)}
    (folder / SEAL).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def check(folder: Path) -> None:
    """Compare a folder's files with its digests; a folder that has none is accepted as it is.

    Raises RequestError naming the first file that differs or is missing.
    """
    for name, digest in sorted(_read(folder).items()):
        path = folder / name
        try:
            same = _digest(path) == digest
        except OSError as error:
            raise RequestError(
                f"`{path}` cannot be read: {error.strerror}", "copy the folder again"
            ) from None
        if not same:
            raise RequestError(
                f"`{path}` is not what was written: it is damaged, or was changed",
                f"copy it again; if you changed it on purpose, remove `{folder / SEAL}`",
            )


def not_ours(folder: Path, editable: tuple[str, ...] = ()) -> str:
    """What in a folder lorafit did not write, in words: a file without a digest, or one that has changed
    since. Empty when lorafit wrote all of it.

    `editable` are names of files that may have changed. Raises RequestError for damaged digests.
    """
    digests = _read(folder)
    sealed = (p for p in sorted(folder.iterdir()) if not p.is_symlink() and (p / SEAL).is_file())
    if found := next(filter(None, map(not_ours, sealed)), ""):
        return found
    for name in sorted(_files(folder)):
        if name == SEAL or (digests and name in editable):
            continue
        path = folder / name
        if name not in digests or path.is_symlink():
            return f"`{path}`, which lorafit did not write"
        if _digest(path) != digests[name]:
            return f"`{path}`, which has changed since lorafit wrote it"
    return ""


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder by their relative names, less those in sub-folders with their own digests.

    An empty sub-folder and a link to a folder count as files: they are there.
    """
    for path in folder.iterdir():
        if not path.is_dir() or path.is_symlink():
            yield path.name
        elif not (path / SEAL).is_file():
            names = list(_files(path))
            yield from (f"{path.name}/{name}" for name in names) if names else (path.name,)


def _read(folder: Path) -> dict[str, str]:
    """The digests that a folder holds, by name; empty where it has none.

    Raises RequestError when they are damaged or name a file outside the folder.
    """
    path = folder / SEAL
    try:
        found = {str(name): str(digest) for name, digest in json.loads(path.read_text("utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(f"`{path}` is damaged: {error}", "copy the folder again") from None
    for name in found:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RequestError(
                f"`{path}` names `{name}`, which is outside the folder", "copy the folder again"
            )
    return found


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a large file, kept in the cache folder by path, size and times of change: a file that
    has not changed is read once.

    A blob of the hub's cache is named by its SHA-256, which is taken unless the blob has changed since it
    was first seen. Raises OSError for a file that cannot be read.
    """
    real = path.resolve()
    now = _stamp(real)
    kept = cache_folder() / KNOWN / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        loaded = json.loads(kept.read_text(encoding="utf-8"))
        known = loaded if isinstance(loaded, dict) else {}
    if known.get("stamp") == now and re.fullmatch("[0-9a-f]{64}", str(known.get("sha256"))):
        return str(known["sha256"])
    blob = not known and path.is_symlink() and real.parent.name == "blobs"
    blob = blob and bool(re.fullmatch("[0-9a-f]{64}", real.name))
    found = real.name if blob else _digest(real)
    settled = blob or time.time_ns() - max(now[1], now[2]) > SETTLED * 1e9
    if settled and _stamp(real) == now:
        with suppress(OSError):  # a cache folder that cannot be written: the file is read again next time
            keep(kept, {"path": str(real), "stamp": now, "sha256": found})
    return found


def _stamp(path: Path) -> list[int]:
    """Size, time of the last change of the content, of the file itself, and its number."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
