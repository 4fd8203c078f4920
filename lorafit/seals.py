"""What lorafit wrote, by its digests: a flipped bit is found before anything is made of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lorafit.errors import RequestError

SEAL = "digests.json"


def seal(folder: Path, but: tuple[str, ...] = ()) -> None:
    """Write the SHA-256 of every file that lies in the folder, `but` some, into `digests.json`."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name not in (SEAL, *but))
    found = {path.name: _digest(path) for path in files}
    (folder / SEAL).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def check(folder: Path) -> None:
    """Hold a folder's files against its digests; a folder that was never sealed is not ours to judge.

    Raises RequestError naming the first file that differs or is missing.
    """
    try:
        found = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        items = sorted(found.items())
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(f"`{folder / SEAL}` is damaged: {error}", "fetch the folder anew") from None
    for name, digest in items:
        path = folder / Path(name).name
        try:
            same = _digest(path) == digest
        except OSError as error:
            raise RequestError(
                f"`{path}` cannot be read: {error.strerror}", "fetch the folder anew"
            ) from None
        if not same:
            raise RequestError(
                f"`{path}` is not what was written: it is damaged, or was changed",
                f"fetch it anew; if you changed it on purpose, remove `{folder / SEAL}`",
            )


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()
