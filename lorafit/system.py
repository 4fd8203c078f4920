"""This machine and its Python: free memory and disk, installed packages, processes."""

from __future__ import annotations

import gc
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import psutil

from lorafit import __version__


def on_apple_gpu() -> bool:
    """Whether this machine has a GPU of Apple's, which torch calls mps."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def free_memory() -> int:
    """Bytes of the host's memory that are free for this process: its share where a launcher started several."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return _free_on_host() // max(1, int(here) if here.isdecimal() else 1)


def _free_on_host() -> int:
    with suppress(OSError, IndexError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(psutil.virtual_memory().available)


def free_disk(place: Path) -> int:
    """Bytes that are free on the disk of a folder that need not be there yet."""
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return 0


@cache
def installed(package: str) -> str:
    """The version of an installed package, or `none`; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
)


def environment() -> dict[str, str]:
    """What a run or a bug report should name: versions, the machine, the command and the date; no library is
    imported for it."""
    return {
        "lorafit": __version__,
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "memory free": f"{free_memory() / 1e9:.1f} GB",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def graphics() -> dict[str, str]:
    """The machine's GPUs and their driver, as nvidia-smi names them; empty without it. Imports no library."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {f"gpu {number}": line.strip() for number, line in enumerate(lines.splitlines()) if line.strip()}


def git_state(path: Path) -> str:
    """The commit that a file or folder is of, and whether it is changed there: `3f2a9c0…, unchanged`. Empty where it
    is not in a repository, or git is not installed."""
    folder, name = (path, ".") if path.is_dir() else (path.parent, path.name)
    git = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder)]

    def told(*words: str) -> str:
        return subprocess.run(
            [*git, *words], capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=20
        ).stdout.strip()

    try:
        commit, state = told("rev-parse", "HEAD"), told("status", "--porcelain", "--ignored", "--", name)
    except (OSError, subprocess.SubprocessError):
        return ""
    words = {"": "unchanged", "??": "not in it", "!!": "not in it"}
    return f"{commit}, {words.get(state[:2], 'changed')}"


def alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        return bool(psutil.pid_exists(pid))
    except OverflowError:
        return False


def read_at(file: BinaryIO, part: memoryview, begin: int) -> int:
    """Read from that place of a file as many bytes as there is room for, or fewer; how many. Where the system can,
    processes that share the open file do not disturb one another."""
    if hasattr(os, "preadv"):
        return int(os.preadv(file.fileno(), [part], begin))
    file.seek(begin)
    return int(file.readinto(part))  # type: ignore[attr-defined]  # files that are open for reading have it


def write_at(file: BinaryIO, data: memoryview, begin: int) -> int:
    """Write the bytes at that place of a file, or the first of them; how many."""
    if hasattr(os, "pwrite"):
        return int(os.pwrite(file.fileno(), data, begin))
    file.seek(begin)
    return file.write(data)


def quiet_libraries() -> None:
    """Keep bitsandbytes from warning of packages that are not needed, when it is imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def without_collecting() -> Iterator[None]:
    """While torch and transformers are imported: what they make lives to the end, and looking for
    garbage among it takes a third of the time. It is left out of later searches too. Once they are there, nothing is
    done: what a run has left behind is still to be collected."""
    if sys.modules.keys() >= {"torch", "transformers", "peft"}:
        yield
        return
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()
