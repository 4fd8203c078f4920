"""Folders that are filled by one process and found by others, also where several hosts share the place."""

import json
import os

import pytest
import torch

from lorafit import cache
from lorafit.errors import RequestError
from lorafit.forward.prefix_store import DiskStore


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache.folder("rows")


def test_what_another_host_fills_is_left_alone_until_it_is_silent(place):
    of_theirs = place / f"a{cache.FILLING}0badcafe-1"
    of_theirs.mkdir(parents=True)
    (of_theirs / "ids").write_bytes(b"12345")
    mine = cache.filling(place / "a")
    assert of_theirs.exists() and mine.exists() and mine != of_theirs
    assert cache.remove_all() == (0, 0) and of_theirs.exists()
    for path in (of_theirs / "ids", of_theirs):
        os.utime(path, (0, 0))
    assert cache.remove_all() == (0, 5) and not of_theirs.exists() and mine.exists(), "this process is alive"


def test_what_two_filled_at_once_is_one_entry(place):
    def store():
        return DiskStore(place / "k", frozenset(["a"]), {"about": "x", "tokens": 1})

    state = torch.ones(1, 2)
    first, second = store(), None
    first.filling = first.filling.rename(
        first.filling.with_name(f"k{cache.FILLING}0badcafe-1")
    )  # of another host
    second = store()
    for each in (first, second):
        each.put("a", state)
        assert torch.equal(each.get("a"), state)
    first.close(), second.close()
    assert [path.name for path in place.iterdir()] == ["k"]


def test_an_entry_is_named_exactly_before_by_its_beginning(place):
    for key in ("abc", "abcd"):
        (place / key).mkdir(parents=True)
        (place / key / cache.INDEX).write_text(json.dumps({"about": key, "tokens": 1, "made": 1}))
    with pytest.raises(RequestError, match="2 caches"):
        cache.remove("ab")
    cache.remove("abc")
    assert [path.name for path in place.iterdir()] == ["abcd"]


def test_all_are_removed_with_what_killed_processes_left(place, run):
    (place / "abc").mkdir(parents=True)
    (place / "abc" / cache.INDEX).write_text(json.dumps({"about": "x", "tokens": 1, "made": 1}))
    left = place / f"abc{cache.FILLING}left"
    left.mkdir()
    (left / cache.JOURNAL).write_text(json.dumps({"about": "x", "expected": 3}) + "\n")
    half = place / f"def{cache.FILLING}{cache._host()}-{2**31 - 7}"
    half.mkdir()
    (half / "ids").write_bytes(b"1234")
    found = run("cache", "--remove", "all", "--json").document
    assert found["removed"] == 2 and found["bytes"] > 4 and [*place.iterdir()] == []
