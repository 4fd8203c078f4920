"""Storages followed, and a log in which blocks stand several times over."""

import gc

import pytest
import torch

from lorafit.estimate import memory_trace
from lorafit.estimate.memory_trace import Allocation, MemoryTrace, repeated


def test_the_tracker_follows_storages_from_their_making_to_their_end():
    seen = MemoryTrace()
    known = torch.nn.Linear(10, 10)
    seen.know(known)
    with seen:
        one = torch.zeros(1000)
        view = one.view(10, 100)
        seen.phase = "head"
        two = view * 2
        del one, view
        three = torch.zeros(500)
        del two, three
        _ = known.weight.t()
    gc.collect()
    peaks = memory_trace.peaks(seen.log, set())
    assert peaks["body"] == {"body": 4000}
    assert peaks["head"] == {"body": 4000, "head": 4000}
    assert sum(entry.bytes for entry in seen.log) == 0


def log_of(text: str) -> list[Allocation]:
    """`f0 +1:100` is: in the forward pass of block 0 storage 1 of 100 bytes is made; `b` is backward."""
    sizes, found, phase, block = {}, [], "body", -1
    for word in text.split():
        if word[0] in "fb":
            phase, block = "body" if word[0] == "f" else "backward", int(word[1:] or -1)
            continue
        number, _, size = word[1:].partition(":")
        if word[0] == "+":
            sizes[number] = int(size)
        found.append(
            Allocation(int(number), sizes[number] if word[0] == "+" else -sizes[number], phase, block)
        )
    return found


def alive(log: list[Allocation]) -> list[int]:
    """The bytes that are there after each entry."""
    found, total = [], 0
    for entry in log:
        total += entry.bytes
        found.append(total)
    return found


def test_a_block_that_stands_three_times_keeps_three_times_as_much():
    """Block 0 keeps 10 bytes for backward, passes 5 on, and makes a gradient of 2 that stays."""
    seen = MemoryTrace()
    seen.log = log_of(
        "f +1:5 f0 +2:10 +3:7 -3 +4:5 f -1 f1 +5:1 f -4 +6:3 b +7:5 b1 -5 b +8:5 b0 -7 -2 +9:2 -8 b -6"
    )
    seen.passed = {0: (1, 4)}
    deeper, gradients = repeated(seen, [3, 1], {9})
    made = [e.bytes for e in deeper if e.block == 0 and e.phase != "backward" and e.bytes > 0]
    assert made == [10, 7, 5] * 3
    assert len(gradients) == 3 and {e.storage for e in deeper if e.bytes == 2} == gradients
    # the third copy at work: what three keep, the state it was given, what passes; and the first one's own
    assert max(alive(deeper)) == 3 * 10 + 5 + 7 + 5
    assert alive(deeper)[-1] == alive(seen.log)[-1] + 2 * 2
    freed = [e.storage for e in deeper if e.bytes < 0]
    assert len(freed) == len(set(freed))


def test_states_that_the_next_block_keeps_are_kept_by_each_copy():
    """Under checkpointing what a block is given is kept until its backward; what the last one makes is not."""
    seen = MemoryTrace()
    seen.log = log_of("f +1:5 f0 +4:5 f +6:3 -4 b +7:5 b0 -1 +8:5 -7 b -8 -6")
    seen.passed = {0: (1, 4)}
    deeper, _ = repeated(seen, [4], set())
    assert max(alive(deeper)) == max(alive(seen.log)) + 3 * 5
    assert alive(deeper)[-1] == 0


@pytest.mark.parametrize("times", [[1, 1], [1, 5]])
def test_what_stands_once_is_as_it_was(times):
    seen = MemoryTrace()
    seen.log = log_of("f +1:5 f0 +2:10 f -1 f1 +3:4 -3 b +4:5 b1 -4 b0 -2")
    deeper, _ = repeated(seen, times, set())
    assert [e.bytes for e in deeper if e.block == 0] == [10, -10]
    assert (len(deeper) == len(seen.log)) is (times == [1, 1])
