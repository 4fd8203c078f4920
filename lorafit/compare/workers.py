"""Work spread over processes that are forked from this one: they share its memory, each computes on one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from lorafit.errors import Interrupted, LorafitError, RequestError, RunError

EVERY = 0.5  # seconds between two looks at whether to stop

Stop = Callable[[], int]


def check_workers(workers: int, device: str) -> None:
    """Raises RequestError where candidates cannot be trained at the same time."""
    if workers > 1 and device != "cpu":
        raise RequestError(
            f"--workers {workers} is for a CPU, and the device is {device}", "leave --workers out"
        )
    if workers > 1 and "fork" not in multiprocessing.get_all_start_methods():
        raise RequestError("--workers needs a system that can fork processes", "leave --workers out")


def spread(tasks: Sequence[Callable[[Stop], Iterator[Any]]], workers: int, stop: Stop) -> Iterator[Any]:
    """Run the tasks in `workers` processes and yield what they yield. Each process takes the next waiting task.

    A task is called with what tells it to stop. Where `stop` asks for an end, or a task raises, all tasks that run are
    told to stop, and the error is raised once they have: Interrupted, or RunError. Raises RunError also when a process is
    killed.
    """
    context: Any = multiprocessing.get_context("fork")  # which no type of Windows' has
    turn, signalled = context.Value("i", 0), context.Value("i", 0)
    ends: dict[Any, Any] = {}  # its pipe's end -> a process
    for _ in range(min(workers, len(tasks))):
        incoming, writer = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(tasks, turn, signalled, writer), daemon=True)
        process.start()
        writer.close()
        ends[incoming] = process
    errors: list[LorafitError] = []
    try:
        while ends:
            ready: list[Any] = list(wait(list(ends), EVERY))
            for reader in ready:
                try:
                    kind, value = reader.recv()
                except EOFError:
                    process = ends.pop(reader)
                    process.join()
                    if process.exitcode:
                        errors.append(_killed(process.exitcode))
                    continue
                if kind == "item":
                    yield value
                else:
                    errors.append(_error(kind, *value))
            number = stop() or (signal.SIGTERM if errors else 0)
            if number and not signalled.value:
                signalled.value = number
    finally:
        for process in ends.values():
            process.kill()
            process.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, Interrupted)), errors[0])


def _work(
    tasks: Sequence[Callable[[Stop], Iterator[Any]]], turn: Any, signalled: Any, writer: Connection
) -> None:
    """The tasks of one process. What it raises is sent; the process ends without cleaning up what is not its own."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process handles them and tells the workers
        signal.signal(number, signal.SIG_IGN)
    try:
        while not signalled.value:
            with turn.get_lock():
                mine = turn.value
                turn.value += 1
            if mine >= len(tasks):
                break
            for item in tasks[mine](lambda: int(signalled.value)):
                writer.send(("item", item))
    except Interrupted as error:
        writer.send(("interrupted", (error.message, error.hint, error.exit_code - 128)))
    except LorafitError as error:
        writer.send(("failed", (error.message, error.hint, 0)))
    except BrokenPipeError:  # the first process is gone
        os._exit(1)
    except Exception as error:
        writer.send(("failed", (f"{type(error).__name__}: {error}", "", 0)))
    writer.close()
    os._exit(0)


def _error(kind: str, message: str, hint: str, number: int) -> LorafitError:
    return Interrupted(message, hint, number) if kind == "interrupted" else RunError(message, hint)


def _killed(code: int) -> RunError:
    return RunError(
        f"a worker was killed (exit code {code}): memory may have run out", "fewer --workers, and --resume"
    )
