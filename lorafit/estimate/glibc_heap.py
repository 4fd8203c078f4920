"""How the C library hands out memory to a step on the CPU: set so that it is not wasted, and foreseen.

glibc alone; elsewhere nothing is changed and nothing is foreseen. Run as a program, it replays a step's
storages and says how far the heap had to grow for them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from array import array
from collections.abc import Iterable
from contextlib import suppress

ALIGNED = 64  # bytes: what PyTorch's tensors are aligned to on the CPU

MAPPED_FROM = 32 << 20  # bytes: the most that M_MMAP_THRESHOLD takes; larger blocks are mapped apart

MXFAST, TRIM_THRESHOLD, MMAP_THRESHOLD = 1, -1, -3  # mallopt's names in malloc.h

TUNABLES, NO_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"

STARTED = "LORAFIT_STARTED_OVER"

STEPS = 3  # that a replay takes: holes of the first are filled by the next

SMALL = range(24, 1032, 16)  # bytes that small objects ask for: one size of each of glibc's small bins

SMALL_OF_A_SIZE = 64_000  # bytes of each of these sizes that are laid by


def start_over() -> None:
    """Start this process over, once, with glibc's cache of small blocks turned off; where that is not
    possible, or is so already, go on.

    An aligned tensor leaves a small block at either side of it. While the cache keeps these they cannot
    rejoin their neighbours, small objects settle in them, and the hole that a tensor leaves is never large
    enough again for one of its size: the heap of a training step grows to twice what it holds. The cache
    is sized as a process starts, and by nothing later.
    """
    here = environment()
    once = os.environ.pop(STARTED, None)  # where the setting is taken away on the way, it stays at that
    if once or here == os.environ or not sys.executable:
        return
    with suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**here, STARTED: "1"})


def environment() -> dict[str, str]:
    """This process's environment, with the cache turned off where glibc is there and nobody has sized it."""
    found = dict(os.environ)
    if library() and NO_CACHE.partition("=")[0] not in found.get(TUNABLES, ""):
        found[TUNABLES] = ":".join(filter(None, [found.get(TUNABLES), NO_CACHE]))
    return found


def library() -> str:
    """The C library and its version where it is glibc; else nothing."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # another C library, another system
        return ""


def keep_freed() -> None:
    """Have the C library keep what tensors free, for the next ones of their size: a step frees and takes
    the same sizes over and over, and each new page costs a fault. What was freed before goes back to the
    system first. No effect but with glibc.

    Small blocks rejoin their neighbours at once, and a few MB of them are laid by, so that small objects
    need not settle in what tensors leave.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = _libc()
        libc.malloc_trim(0)
        libc.mallopt(MXFAST, 0)
        libc.mallopt(MMAP_THRESHOLD, MAPPED_FROM)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        laid_by = []
        for size in SMALL:
            for _ in range(SMALL_OF_A_SIZE // size):
                laid_by.append(libc.malloc(size))
                libc.malloc(SMALL.start)  # a wall: or they would become one block again
        for block in laid_by:
            libc.free(block)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    return libc


def extent(log: Iterable[tuple[int, int]]) -> int | None:
    """Bytes that the heap grows to where a training step takes and frees these storages over and over;
    None where that cannot be told.

    `log` has (number of the storage, bytes taken; or less than none, freed). A process of its own asks
    the C library that is here for each of them, as a training process would; no byte is touched, so none
    of it is really used.
    """
    if not library():
        return None
    events = array("q", [value for event in log for value in event])
    try:
        made = subprocess.run(
            [sys.executable, "-I", "-S", __file__],
            input=events.tobytes(),
            capture_output=True,
            env=environment(),
            check=True,
        )
        return int(made.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):  # more than there are addresses for
        return None


def _replay(events: array[int]) -> int:
    """The furthest that the heap, and what is mapped apart, reach. Raises MemoryError where they cannot."""
    libc = _libc()
    keep_freed()
    start, highest, mapped = libc.sbrk(0), 0, 0
    block = ctypes.c_void_p()
    live: dict[int, tuple[int | None, int]] = {}
    for _ in range(STEPS):
        for number, size in zip(events[::2], events[1::2], strict=True):
            if size > 0:
                if libc.posix_memalign(ctypes.byref(block), ALIGNED, size):
                    raise MemoryError
                apart = size if size >= MAPPED_FROM else 0
                live[number] = block.value, apart
                mapped += apart
                highest = max(highest, libc.sbrk(0) - start + mapped)
            elif number in live:
                place, apart = live.pop(number)
                libc.free(place)
                mapped -= apart
        for place, _ in live.values():  # the gradients, when the step is done
            libc.free(place)
        live.clear()
        mapped = 0
    return highest


if __name__ == "__main__":
    print(_replay(array("q", sys.stdin.buffer.read())))
