"""The folders that commands write: made under another name and renamed, and never in place of anything
that lorafit did not write or that the command reads.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorafit.digests import not_ours
from lorafit.errors import RequestError, RunError
from lorafit.system import alive

CARD, PAGE = "README.md", "report.html"

EVENTS, RUN_FILE, HELD_OUT = "events.jsonl", "run.yaml", "held-out.safetensors"
COMPARISON = "request.json"  # what a folder of compared candidates was asked for
TRACKING = "tracking.json"  # the run as its trackers know it

PARTIAL, RUNS = ".partial", "runs"  # of the name of an unfinished run; where runs without -o are

# What has no digest: a person may edit it, lorafit adds to it later, or it stays here when a run is pushed.
EDITABLE = (EVENTS, RUN_FILE, CARD, PAGE, HELD_OUT, TRACKING)

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def check_target(target: Path, overwrite: bool, reads: Sequence[Path] = ()) -> None:
    """Check that a folder may be made at `target`. `reads` are the files and folders the command reads.

    Raises RequestError when something is there that may not be replaced: without `overwrite`
    anything; with it whatever lorafit did not write (by its digests), and whatever is, holds or lies in
    something that is read, or is or holds the working directory.
    """
    if target.name in ("", ".."):
        raise RequestError(f"`{target}` is not a name for a new folder", "-o DIR names one")
    if target.is_symlink() and not target.exists():
        raise RequestError(f"`{target}` is a link whose target is missing", "choose another -o")
    if not target.exists():
        return
    if not target.is_dir():
        raise RequestError(f"`{target}` is a file", "choose another -o")
    if not overwrite:
        raise RequestError(f"`{target}` exists", "choose another -o, or --overwrite to replace it")
    place = target.resolve()
    if Path.cwd().resolve().is_relative_to(place):
        raise RequestError(f"`{target}` holds the working directory: it is not replaced", "choose another -o")
    check_not_read(target, reads)
    if found := not_ours(target, EDITABLE):
        raise RequestError(
            f"`{target}` holds {found}: it is not replaced",
            "choose another -o, or remove the folder yourself",
        )


def check_not_read(target: Path, reads: Sequence[Path]) -> None:
    """Raises RequestError when a folder that is to go is, holds or lies in something that the command reads."""
    place = target.resolve()
    for path in reads:
        other = path.expanduser().resolve()
        if other == place:
            raise RequestError(f"`{target}` is read by this command: it is not replaced", "choose another -o")
        if other.is_relative_to(place):
            raise RequestError(
                f"`{target}` holds `{path}`, which this command reads: it is not replaced",
                "choose another -o",
            )
        if place.is_relative_to(other):
            raise RequestError(
                f"`{target}` lies in `{path}`, which this command reads: it is not replaced",
                "choose another -o",
            )


def check_file(path: Path, option: str, mark: str) -> None:
    """Check that a page may be written to `path`: nothing is there, or a file that holds `mark` near its
    start, as lorafit's own do.

    Raises RequestError otherwise, naming the option.
    """
    if path.is_dir():
        raise RequestError(f"{option} `{path}` is a folder", "name a file in it, as report.html")
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        start = file.read(2000)
    if mark.encode() not in start:
        raise RequestError(
            f"{option} `{path}` is a file that lorafit did not write: it is not replaced", "another name"
        )


def last_run(place: Path = Path(RUNS), unfinished: bool = False) -> str:
    """The newest finished run in a folder, or of the unfinished ones, by the name it will have; empty where there
    is none."""
    found = [path for path in place.glob("*") if (path / RUN_FILE).is_file()]
    found = [path for path in found if path.name.endswith(PARTIAL) is unfinished]
    newest = max(found, key=lambda path: (path / RUN_FILE).stat().st_mtime, default=None)
    return str(newest).removesuffix(PARTIAL) if newest else ""


def work_folder(target: Path, what: str) -> Path:
    """A new folder beside `target` in which this process makes what will stand there; what processes
    that were killed left under such a name is removed.

    Raises OSError where it cannot be made.
    """
    stem = f".{target.name}.{what}-"
    for path in target.parent.glob(f"{stem}*") if target.parent.is_dir() else ():
        pid = path.name.removeprefix(stem)
        if pid.isdigit() and not alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    work = target.with_name(f"{stem}{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def put_in_place(work: Path, target: Path) -> None:
    """Rename a finished folder to its target; an older one there is moved aside first, then removed."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists() or target.is_symlink():
        target.rename(old)
    work.rename(target)
    sync(target.parent)
    if old.is_symlink():
        old.unlink()
    elif old.exists():
        shutil.rmtree(old)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or to a folder where the system can: Windows opens none."""
    folder = path.is_dir()
    if folder and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(
        path, os.O_RDONLY if folder else os.O_RDWR
    )  # Windows writes out what is open to write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path, again: str = "--resume") -> Iterator[None]:
    """What goes wrong where a folder is written, as RunError: what was saved before is whole.

    `again` is what continues once there is room.
    """
    try:
        yield
    except Exception as error:
        # safetensors has an error of its own for a full disk, and is imported only where tensors are
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        number = getattr(error, "errno", None)
        full = number in FULL or "os error 28" in str(error) or "os error 27" in str(error)
        why = "the disk is full" if full else getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(
            f"`{folder}` cannot be written: {why}; what was saved before is whole",
            f"{'make room' if full else 'check the disk'}, then {again}",
        ) from error
