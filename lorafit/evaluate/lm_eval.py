"""Known benchmarks, through EleutherAI's lm-eval: nothing of them is written again here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import RequestError, RunError
from lorafit.results import Benchmark
from lorafit.settings import read_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Tasks:
    """Benchmarks by lm-eval's names, or as task files of one's own; of each at most `limit` documents,
    where it is not 0."""

    chosen: tuple[str | dict[str, Any], ...]
    limit: int = 0
    batch_size: int = 8

    @staticmethod
    def named(text: str, task: str, limit: int = 0, batch_size: int = 8) -> Tasks:
        """`hellaswag,arc_easy`, each the name of a task, a group or a tag, or a task's YAML file.

        Raises RequestError when lm-eval is not installed, knows none of that name, or has no use for
        a model of that `task`.
        """
        if task == "masked":
            raise RequestError(
                "lm-eval's benchmarks are for models that go on with a text, and this one fills masks"
            )
        try:
            import lm_eval.tasks  # noqa: F401
        except ImportError:
            raise RequestError(
                "--tasks needs lm-eval, which is not installed", "pip install 'lorafit[lm-eval]'"
            ) from None
        chosen: list[str | dict[str, Any]] = []
        for name in (part.strip() for part in text.split(",")):
            if Path(name).suffix in (".yaml", ".yml"):
                config = read_yaml(Path(name).expanduser(), "task file")
                chosen.append({"task": Path(name).stem, **config})
                continue
            found = _manager().match_tasks([name]) if name else []
            if not found:
                raise RequestError(f"lm-eval has no task `{name}`", "lm-eval ls tasks names them")
            chosen += found
        return Tasks(tuple(chosen), limit, batch_size)

    def measured(
        self, model: Any, name: str, tokenizer: PreTrainedTokenizerBase, task: str, device: str
    ) -> list[Benchmark]:
        """What a model reaches, a figure for each task and metric. Raises RunError when lm-eval fails."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with _hushed():
            try:
                backend = "seq2seq" if task == "seq2seq" else "causal"
                judge = HFLM(
                    pretrained=model,
                    backend=backend,
                    tokenizer=tokenizer,
                    batch_size=self.batch_size,
                    device=device,
                )
                found = simple_evaluate(
                    model=judge,
                    tasks=[dict(t) if isinstance(t, dict) else t for t in self.chosen],
                    limit=self.limit or None,
                    log_samples=False,
                    bootstrap_iters=1000,
                    task_manager=_manager(),
                )
            except Exception as error:  # the code and the data of any task
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise RunError(
                    f"lm-eval failed: {type(error).__name__}: {lines[0][:300] if lines else ''}",
                    "a task's data are fetched from the hub once; offline they must be there",
                ) from None
        return list(_figures(found["results"] if found else {}, name))


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks: reading it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _hushed() -> Iterator[None]:
    """Of what lm-eval and the programs it starts say, a person at a terminal sees the bars alone."""
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with ExitStack() as stack:
            where = terminal if sys.stderr.isatty() else nowhere
            bars = stack.enter_context(open(where, "w", closefd=False))
            stack.enter_context(redirect_stdout(bars))
            stack.enter_context(redirect_stderr(bars))
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _figures(results: dict[str, Any], model: str) -> Sequence[Benchmark]:
    figures = []
    for task, row in results.items():
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if (
                metric.endswith("_stderr")
                or not isinstance(value, (int, float))
                or key in ("sample_len", "alias")
            ):
                continue
            stderr = row.get(f"{metric}_stderr,{kind}")
            figures.append(
                Benchmark(
                    task,
                    metric if kind in ("", "none") else f"{metric}, {kind}",
                    model,
                    float(value),
                    float(stderr) if isinstance(stderr, (int, float)) else None,
                )
            )
    return figures
