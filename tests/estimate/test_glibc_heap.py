"""What the C library is asked, and what it answers for a step's storages."""

import os
import subprocess
import sys

import pytest

from lorafit.estimate import glibc_heap
from lorafit.estimate.glibc_heap import (
    MAPPED_FROM,
    NO_CACHE,
    TUNABLES,
    extent,
    library,
)

glibc = pytest.mark.skipif(not library(), reason="another C library than glibc: nothing is changed there")


def started(code: str, **more: str) -> tuple[str, int]:
    """What a Python process of its own prints, and the number it was started under."""
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    process = subprocess.Popen(
        [sys.executable, "-c", f"from lorafit.estimate.glibc_heap import STARTED, TUNABLES, keep_freed, start_over; import os\n{code}"], env={**environment, **more},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, _ = process.communicate()
    assert process.returncode == 0
    return out, process.pid


@glibc
def test_a_process_starts_over_once_and_stays_the_same_one():
    code = "print(os.getpid(), flush=True); start_over(); print(os.environ[TUNABLES])"
    out, number = started(code)
    assert out.split() == [str(number), str(number), NO_CACHE]


@glibc
def test_what_a_user_has_set_stays():
    show = "start_over(); print(os.environ[TUNABLES])"
    own = "glibc.malloc.arena_max=1"
    assert started(show, GLIBC_TUNABLES=own)[0].strip() == f"{own}:{NO_CACHE}"
    sized = "glibc.malloc.tcache_count=3"
    assert started(show, GLIBC_TUNABLES=sized)[0].strip() == sized


@glibc
def test_where_the_setting_is_taken_away_it_is_not_tried_forever():
    """A process that the system does not trust loses it on the way: here by a loader that clears it."""
    code = "os.environ.pop(TUNABLES, None); start_over(); print('on', STARTED in os.environ)"
    assert started(code)[0].split() == ["on", "False"]


@pytest.mark.parametrize("kind", ["another library", "another system"])
def test_with_another_library_nothing_is_changed(monkeypatch, kind):
    if kind == "another system":
        monkeypatch.delattr(os, "confstr")
    else:
        monkeypatch.setattr(os, "confstr", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert library() == "" and glibc_heap.environment() == dict(os.environ)
    assert extent([(1, 1000)]) is None


@glibc
def test_the_heap_reaches_as_far_as_its_storages():
    size = 1 << 20
    taken = [(number, size) for number in range(20)]
    freed = [(number, -size) for number in range(20)]
    assert extent([*taken, *freed]) == pytest.approx(20 * size, rel=0.05)
    in_turn = [event for number in range(20) for event in ((number, size), (number, -size))]
    assert extent(in_turn) == pytest.approx(size, rel=0.2)


@glibc
def test_holes_that_fit_nothing_are_counted():
    """Every second of twenty storages is freed, and what comes next is larger than any hole."""
    size = 1 << 20
    log = [(number, size) for number in range(20)]
    log += [(number, -size) for number in range(0, 20, 2)]
    log += [(100 + number, 3 * size) for number in range(5)]
    held = 10 * size + 15 * size
    assert extent(log) > 1.3 * held


@glibc
def test_large_storages_are_apart_and_go_back():
    size = 2 * MAPPED_FROM
    log = [event for number in range(5) for event in ((number, size), (number, -size))]
    assert extent(log) == pytest.approx(size, rel=0.05)


@glibc
def test_more_than_there_are_addresses_for_is_not_told():
    assert extent([(1, 1 << 60)]) is None


@glibc
def test_a_hole_is_taken_again_by_what_left_it():
    """Tensors of one size, taken and freed with small objects in between: without the setting each hole
    is a little too small for the next, and the heap can grow by hundreds of MB."""
    code = """
import torch
keep_freed()
held = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024
kept = []
def rounds(count):
    for step in range(count):
        tensors = []
        for number in range(20):
            tensors.append(torch.ones(1 << 18))  # 1 MiB
            kept.append(bytes(600 + 16 * (number % 3)))
            passing = torch.ones(1 << 19)
            kept.append([0] * 3)
            del passing
        del tensors[::2]
        for number in range(10):
            tensors.append(torch.ones(1 << 18))
            kept.append(torch.ones(8))
rounds(2)
before = held()
rounds(50)
print(held() - before)
"""
    grown = int(started("start_over()\n" + code)[0])
    assert grown <= 8, f"{grown} MiB"
