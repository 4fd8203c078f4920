"""A run's folder: written beside its name, locked while it is written, renamed when it is whole.

A run writes into `NAME.partial` beside its target and renames it at the end, so a folder of the target's
name is always a finished run. A lock on the working folder dies with the process that holds it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorafit.adapter import TEMPLATES, TOKENIZER, WEIGHTS, is_one, recorded_tokenizer
from lorafit.digests import SEAL, seal
from lorafit.errors import RequestError, RunError
from lorafit.outputs import EDITABLE, PARTIAL, RUN_FILE, RUNS, check_not_read, check_target, put_in_place

try:
    import fcntl
except ImportError:  # Windows has none: a file beside the folder is locked there
    fcntl = None  # type: ignore[assignment]

LAST_GOOD = "last-good"

# What a run writes into its working folder; anything else there is somebody else's.
WRITTEN = re.compile(
    r"\.?(adapter_config\.json|adapter_model\.safetensors|base\.json|run\.yaml|events\.jsonl|README\.md|report\.html"
    r"|digests\.json|tracking\.json|held-out\.safetensors|generation_config\.json|checkpoint-\d+(\.old-\d+)?|last-good)"
)


@dataclass(slots=True)
class RunFolder:
    """Where a run will stand, and where it is written until it is whole."""

    target: Path
    lock: Callable[[], None] | None = None  # gives the working folder back while this process has it
    replaces: bool = False  # what stood at the target when the run began

    @property
    def work(self) -> Path:
        return self.target.with_name(self.target.name + PARTIAL)

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints of an unfinished run, the oldest first."""
        return _checkpoints(self.work)

    def open(self, overwrite: bool, resume: bool, reads: Sequence[Path] = ()) -> None:
        """Make the working folder, and take its lock. `reads` are the files and folders the run reads.

        Raises RequestError when the target is there and may not be replaced, when the working folder
        holds anything that is not a run's, when another run is writing there, or when an unfinished
        run lies there and is neither resumed nor replaced.
        """
        check_target(self.target, overwrite, reads)
        self.replaces = self.target.exists()
        if self.work.is_symlink() or (self.work.exists() and not self.work.is_dir()):
            raise RequestError(f"`{self.work}` is not a folder", "choose another -o")
        there = self.work.is_dir()
        if there and (odd := _not_a_run(self.work)):
            raise RequestError(
                f"`{self.work}` holds `{odd}`, which is not part of a run", "choose another -o"
            )
        try:
            self.lock = lock_folder(self.work)
        except OSError as error:
            raise RequestError(f"cannot write `{self.work}`: {error.strerror}", "choose another -o") from None
        if self.lock is None:
            raise RequestError(
                f"another run is writing `{self.work}`", "choose another -o, or wait for its end"
            )
        if there and not resume and not overwrite:
            self.release()
            raise RequestError(
                f"an unfinished run lies in `{self.work}`",
                "--resume to go on with it, --overwrite to start anew",
            )
        if there and not resume:
            try:
                check_not_read(self.work, reads)
            except RequestError:
                self.release()
                raise
            for path in self.work.iterdir():  # the folder itself keeps the lock
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def release(self) -> None:
        """Give the lock back."""
        if self.lock is not None:
            self.lock()
            self.lock = None

    def prune(self, keep: int, best: int | None) -> None:
        """Remove all checkpoints but the last `keep` and the one of step `best`."""
        for path in self.checkpoints[:-keep]:
            if path.name != f"checkpoint-{best}":
                shutil.rmtree(path)

    def finish(self, keep: int, best: int | None) -> None:
        """Seal the finished run and put it in its place; what stood there goes only then.

        Of the checkpoints the last `keep` stay, and the one of step `best`. What is there to be edited is
        not sealed. Raises RunError where something appeared in that place meanwhile: the run stays where it is.
        """
        kept = {f"checkpoint-{best}", *(p.name for p in (self.checkpoints[-keep:] if keep else ()))}
        seal(self.work, but=EDITABLE)
        if self.target.exists() and not self.replaces:
            self.release()
            raise RunError(
                f"`{self.target}` appeared during the run, and is not replaced: the finished run is in `{self.work}`",
                f"mv {shlex.quote(str(self.work))} {shlex.quote(f'{self.target}-2')}",
            )
        put_in_place(self.work, self.target)
        self.release()
        for path in _checkpoints(self.target):
            if path.name not in kept:
                shutil.rmtree(path)

    def abandon(self) -> None:
        """Leave nothing behind of a run that kept nothing worth going on from; give the lock back."""
        if self.lock is not None and not any(
            (self.checkpoints, (self.work / WEIGHTS).is_file(), (self.work / LAST_GOOD).is_dir())
        ):
            shutil.rmtree(self.work, ignore_errors=True)
            self.release()
            if self.work.parent.name == RUNS:
                with suppress(OSError):  # it holds other runs
                    self.work.parent.rmdir()
        self.release()


def _not_a_run(folder: Path) -> str:
    """The name of something in a working folder that no run writes; empty where there is none."""
    names = sorted(path.name for path in folder.iterdir())
    if names and not {RUN_FILE, f".{RUN_FILE}"} & {*names}:
        return names[0]
    ours = {*_of_the_tokenizer(folder)}
    return next((name for name in names if name not in ours and not WRITTEN.fullmatch(name)), "")


def _of_the_tokenizer(folder: Path) -> list[str]:
    """The files in a working folder that a tokenizer is made of, by the kinds that are known, and by what the run says:
    tokenizers may write files of any name."""
    known = [path.name for path in folder.iterdir() if is_one(path, (*TOKENIZER, *TEMPLATES))]
    return [*known, *recorded_tokenizer(folder)]


def _checkpoints(folder: Path) -> list[Path]:
    found = [
        p
        for p in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-[0-9]+", p.name) and (p / SEAL).is_file()
    ]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def lock_folder(folder: Path) -> Callable[[], None] | None:
    """Make a folder and take its lock, which dies with the process and its children: what gives it back; None when
    another process has it. Raises OSError."""
    return _lock(folder) if fcntl is not None else _lock_beside(folder)


def _lock(folder: Path) -> Callable[[], None] | None:
    """Make a folder and take its lock: what gives it back; None when another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]  # on Windows
        # the run that had it may have been finished, and its folder renamed, in between
        if os.fstat(descriptor).st_ino == os.stat(folder).st_ino:
            return partial(os.close, descriptor)
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def _lock_beside(folder: Path) -> Callable[[], None] | None:
    """The same where no folder can be locked: a file beside it is."""
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(beside, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None

    def give_back() -> None:
        lock.release()
        with suppress(OSError):  # another process has it by now
            beside.unlink()

    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        give_back()
        raise
    return give_back


def is_written(target: Path) -> bool:
    """Whether a process is writing the run of that name now. Its lock is asked for, and not kept."""
    work = RunFolder(target).work
    if fcntl is None:
        beside = work.with_name(f"{work.name}.lock")
        free = _lock_beside(work) if work.is_dir() and beside.is_file() else lambda: None
        if free is not None:
            free()
        return free is None
    try:
        descriptor = os.open(work, os.O_RDONLY)
    except OSError:
        return False
    try:  # a shared lock: two that ask at once do not take one another for a run
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # type: ignore[attr-defined]  # on Windows
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def claim(stem: str) -> RunFolder:
    """`runs/STEM-1` opened, or the first number that neither a run nor an unfinished one has."""
    number = 1
    while True:
        folder = RunFolder(Path(RUNS) / f"{stem}-{number}")
        if not folder.target.exists() and not folder.work.exists():
            with suppress(RequestError):
                folder.open(overwrite=False, resume=False)
                return folder
            if not folder.work.exists():  # not taken by another run: it cannot be written
                folder.open(overwrite=False, resume=False)
        number += 1


def rewind(events: Path, step: int) -> None:
    """Cut a run's events to those up to its checkpoint of that step: the rest is done again."""
    if not events.is_file():
        return
    kept: list[bytes] = []
    end = 0
    for raw in events.read_bytes().splitlines(keepends=True):
        try:
            event = json.loads(raw)
        except ValueError:  # the line that a killed run was writing
            break
        if event.get("event") in ("step", "evaluated", "saved"):
            if event["step"] > step:
                break
            end = len(kept) + 1
        kept.append(raw)
    beside = events.with_name(f".{events.name}")
    beside.write_bytes(b"".join(kept[: end if step else 0]))
    beside.replace(events)
