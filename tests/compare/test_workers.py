import os
import signal
import time

import pytest
import torch
from comparisons import comparison_of

from lorafit.compare import Began, Ended
from lorafit.compare.workers import check_workers, spread
from lorafit.errors import Interrupted, RequestError, RunError

LISTS = {"presets": ["basic,ffn"], "layers": ["low,high"]}


def test_candidates_trained_at_once_end_as_one_after_another(tiny, pairs, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = comparison_of(tiny("llama"), pairs, tmp_path / "a", **LISTS)
        list(alone.run())
        both = comparison_of(tiny("llama"), pairs, tmp_path / "b", **LISTS)
        both.workers = 2
        ended = [e.outcome.name for e in both.run() if isinstance(e, Ended)]
    finally:
        torch.set_num_threads(threads)
    assert sorted(ended) == sorted(alone.outcomes())
    for name, outcome in alone.outcomes().items():
        assert both.outcomes()[name].scores == outcome.scores


def test_all_workers_stop_and_the_comparison_goes_on(tiny, pairs, tmp_path):
    lists = {**LISTS, "flags": {"epochs": 12, "batch_size": 2}}
    begun = []
    first = comparison_of(tiny("llama"), pairs, tmp_path / "c", stop=lambda: 2 if begun else 0, **lists)
    first.workers = 2
    with pytest.raises(Interrupted) as stopped:
        for event in first.run():
            if isinstance(event, Began):
                begun.append(event)
    assert stopped.value.exit_code == 130 and "lorafit compare --resume" in stopped.value.hint
    again = comparison_of(tiny("llama"), pairs, tmp_path / "c", resume=True, **lists)
    again.workers = 2
    list(again.run())
    assert {o.status for o in again.outcomes().values()} == {"finished"} and len(again.outcomes()) == 4


def test_each_task_is_done_once_and_what_is_wrong_is_raised_after_all_have_stopped():
    def task(number):
        def run(stop):
            yield number
            yield os.getpid()

        return run

    said = list(spread([task(n) for n in range(10)], 3, lambda: 0))
    assert sorted(x for x in said if x < 10) == list(range(10)) and len(said) == 20
    assert len({x for x in said if x >= 10}) <= 3 and os.getpid() not in said

    def wrong(stop):
        yield 1
        raise RunError("the disk is full", "make room")

    def waits(stop):
        while not stop():
            time.sleep(0.02)
        yield 2

    seen = []
    with pytest.raises(RunError, match="the disk is full") as error:
        seen.extend(iter(spread([wrong, waits], 2, lambda: 0)))
    assert error.value.hint == "make room"


def test_a_worker_that_is_killed_is_said():
    def dies(stop):
        yield 1
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RunError, match="was killed"):
        list(spread([dies, dies], 2, lambda: 0))


def test_workers_are_for_a_cpu():
    check_workers(2, "cpu")
    check_workers(1, "cuda")
    with pytest.raises(RequestError, match="--workers 2 is for a CPU"):
        check_workers(2, "cuda")
