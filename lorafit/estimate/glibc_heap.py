"""glibc's malloc during a step on the CPU: tuned so that the heap stays small, and its size predicted.

Only for glibc; elsewhere nothing is changed or predicted. Run as a program, this file replays a step's
allocations and prints how far the heap grew.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from array import array
from collections.abc import Iterable
from contextlib import suppress

ALIGNED = 64  # bytes: the alignment of PyTorch's tensors on the CPU

MAPPED_FROM = 32 << 20  # bytes: the largest M_MMAP_THRESHOLD; larger blocks are mapped on their own
LARGE = 2**20  # bytes of a block that is given back at once

MXFAST, TRIM_THRESHOLD, MMAP_THRESHOLD = 1, -1, -3  # mallopt's names in malloc.h

TUNABLES, NO_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"

STARTED = "LORAFIT_STARTED_OVER"

STEPS = 3  # steps of a replay: the holes of the first are filled by the next

SMALL = range(24, 1032, 16)  # bytes of small objects: one size for each of glibc's small bins

SMALL_OF_A_SIZE = 64_000  # bytes of each of these sizes that are kept free


def start_over() -> None:
    """Restart this process, once, with glibc's thread cache (tcache) off; do nothing where it is off
    already or cannot be set.

    An aligned tensor leaves a small block at either side. While the tcache keeps these blocks they are
    not merged with their neighbours and small objects are placed in them, so the hole of a freed tensor
    is no longer large enough for one of the same size: the heap of a training step grows to twice what
    it holds. The tcache can only be sized when a process starts.
    """
    here = environment()
    once = os.environ.pop(STARTED, None)  # do not restart twice, even if the setting was lost
    if once or here == os.environ or not sys.executable:
        return
    with suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**here, STARTED: "1"})


def environment() -> dict[str, str]:
    """This process's environment with the tcache off, on glibc and unless GLIBC_TUNABLES sizes it already."""
    found = dict(os.environ)
    if library() and NO_CACHE.partition("=")[0] not in found.get(TUNABLES, ""):
        found[TUNABLES] = ":".join(filter(None, [found.get(TUNABLES), NO_CACHE]))
    return found


def library() -> str:
    """glibc and its version, e.g. `glibc 2.36`; empty for another C library."""
    if not hasattr(os, "confstr"):  # Windows
        return ""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):  # another C library
        return ""


def keep_freed() -> None:
    """Make malloc keep freed memory for the next tensors: a step allocates and frees the same sizes over
    and over, and each new page costs a page fault. Memory that is free now is returned to the system first.
    No effect without glibc.

    Small blocks are merged with their neighbours at once, and a few MB of them are kept free, so that
    small objects are not placed in the holes of tensors.
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
                libc.malloc(SMALL.start)  # a block between, or they would be merged again
        for block in laid_by:
            libc.free(block)


def give_back_freed() -> None:
    """Make malloc return each large block to the system once it is freed: where the weights of a layer come and go
    between tensors that stay, their holes would be filled by smaller ones, and the heap would grow with each layer.
    No effect without glibc."""
    with suppress(OSError, AttributeError, TypeError):
        libc = _libc()
        libc.malloc_trim(0)
        libc.mallopt(MMAP_THRESHOLD, LARGE)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    return libc


def extent(log: Iterable[tuple[int, int]]) -> int | None:
    """Bytes that the heap grows to while a training step allocates and frees these storages repeatedly;
    None where it cannot be measured.

    `log` has (number of the storage, bytes: positive when allocated, negative when freed). A process of
    its own replays them through this machine's malloc; no byte is touched, so no memory is really used.
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
    except (OSError, ValueError, subprocess.CalledProcessError):  # more than the address space
        return None


def _replay(events: array[int]) -> int:
    """The largest size of the heap and the mapped blocks, in bytes. Raises MemoryError where malloc fails."""
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
