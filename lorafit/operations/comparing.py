"""Many candidates over the same rows: which there are, what they cost, then trained as events, with an answer."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.compare import (
    CompareFolder,
    Request,
    check_workers,
    full_settings,
    look_ahead,
    new_folder,
    parse_count,
    parse_duration,
    resolve_all,
)
from lorafit.data import find_sources
from lorafit.errors import RequestError
from lorafit.estimate import TOO_MUCH
from lorafit.model import chart_of, find, load_tokenizer, pick_device
from lorafit.operations.planning import train_command
from lorafit.operations.progress import Bar, no_bar
from lorafit.outputs import COMPARISON, check_target
from lorafit.settings import settle
from lorafit.system import without_collecting
from lorafit.units import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.compare import Ahead, Answer, Candidate, Happening, Impossible
    from lorafit.data import Rows, RowSet
    from lorafit.model import ModelMap, ModelSource


@dataclass(frozen=True, slots=True)
class Candidates:
    """A comparison before its rows are read: what was asked for, the candidates, and those that are impossible."""

    asked: Request
    target: Path
    source: ModelSource
    found: ModelMap
    candidates: Sequence[Candidate]
    impossible: Sequence[Impossible]
    common: Mapping[str, Any]
    trainable: int | None


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison before its model is loaded: its candidates, its rows and its cost."""

    asked: Request
    of: Candidates
    ahead: Ahead
    rows: Rows
    also: Mapping[str, RowSet]
    tokenizer: PreTrainedTokenizerBase
    threads: int  # of torch, to go back to


def resolve_comparison(asked: Request, target: Path | None, resume: bool) -> Candidates:
    """Which candidates there are; with `resume`, those of an unfinished comparison. Raises RequestError for what is
    wrong before any row is read."""
    asked, target = _resumed(asked, target) if resume else (asked.checked(), target)
    common, wanted = asked.wanted()
    first, _ = settle({**common, **wanted[0].settings}, asked.config)
    if not first.holds_out:
        raise RequestError(
            "candidates are compared on held-out rows, and --holdout 0 holds out none", "--holdout 0.05"
        )
    source = find(first.model, first.revision)
    find_sources(first)
    if target is None:
        target = new_folder(re.sub(r"[^\w.]+", "-", first.model.rpartition("/")[2]).strip("-.")[:60])
    if not (target / COMPARISON).is_file():
        check_target(target, False)
    found = chart_of(source)
    trainable = parse_count(asked.trainable) if asked.trainable else None
    candidates, impossible = resolve_all(found, wanted, common, asked.config, trainable)
    return Candidates(asked, target, source, found, candidates, impossible, common, trainable)


def prepare_comparison(of: Candidates, workers: int = 1, bar: Bar = no_bar) -> Compared:
    """Read the rows and foresee the cost. Raises RequestError where no candidate is possible."""
    if not of.candidates:
        raise RequestError("none of the candidates is possible", of.impossible[0].reason)
    asked, found, config = of.asked, of.found, of.candidates[0].config
    with without_collecting():
        from lorafit.data import load, read_eval_rows
    check_workers(workers, pick_device(config.device).type)
    import torch

    threads = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)  # what is timed and filled here runs as the candidates will
    tokenizer = load_tokenizer(of.source.place, of.source.name)
    with bar("reading", bytes_text) as tick:
        rows = load(config, tokenizer, found.task, found.vocab_size, tick)
    plain = replace(config, format="auto", map=None)
    names = [Path(spec).name for spec in asked.also]
    also = {
        name if names.count(name) == 1 else spec: read_eval_rows(
            [spec], plain, tokenizer, found.task, found.vocab_size
        )
        for name, spec in zip(names, asked.also, strict=True)
    }
    budget = parse_duration(asked.budget) if asked.budget and asked.steps is None else None
    with bar("planning") as tick:
        ahead = look_ahead(of.source, found, of.candidates, rows.look, budget, tick, workers, asked.steps)
    if budget is not None:
        asked = replace(asked, steps=max(cost.steps or 1 for cost in ahead.costs.values()))
    return Compared(asked, of, ahead, rows, also, tokenizer, threads)


def check_peak(ahead: Ahead) -> str:
    """A warning when the predicted peak is more than the free memory, else nothing. Raises RequestError when it is
    more than TOO_MUCH times that."""
    one = next(iter(ahead.forecasts.values()))
    device, free = one.device, one.free
    if ahead.peak <= free:
        return ""
    what = f"the largest candidate needs {bytes_text(ahead.peak)} at its peak, and {bytes_text(free)} are free on {device}"
    if ahead.peak > TOO_MUCH * free:
        streams = ahead.candidates[0].streams
        less = "" if streams else ", or --prefix-residency stream, which leaves out what begins at layer 0"
        raise RequestError(what, f"a smaller --batch-size, or --gradient-checkpointing{less}")
    return what


def compare_events(run: Compared, resume: bool, stop: Callable[[], int]) -> Iterator[Happening | Answer]:
    """Train what is missing, as events; the last is the answer, which is written too.

    `stop` returns the number of the signal that asks for an end, or 0. Raises Interrupted then.
    """
    folder = CompareFolder(run.of.target)
    folder.open(resume)
    with folder.locked():
        digests = [run.rows.train.digest, run.rows.held_out.digest]
        folder.begin(run.asked, digests, {one.name: one.digest for one in run.ahead.candidates})
        yield from _trained(run, folder, stop)


def _trained(run: Compared, folder: CompareFolder, stop: Callable[[], int]) -> Iterator[Happening | Answer]:
    """The candidates, trained in a folder that is this process's own."""
    import torch

    from lorafit.compare import Comparison, Hint, SharedBase, answer_of, with_hint, write_answer
    from lorafit.train import load_base

    of, candidates, hint = run.of, run.ahead.candidates, None
    shared = SharedBase(lambda: load_base(of.source, of.found, candidates[0].config, run.ahead.lowest.plan))
    with closing(shared):
        comparison = Comparison(
            run.ahead,
            shared,
            run.rows,
            run.tokenizer,
            folder,
            run.also,
            halving=run.asked.halving,
            hints=run.asked.hint,
            workers=run.ahead.workers,
            stop=stop,
        )
        try:
            for event in comparison.run():
                hint = event if isinstance(event, Hint) else hint
                yield event
        finally:
            torch.set_num_threads(run.threads)
    base, outcomes = folder.base(), comparison.outcomes()
    assert base is not None
    answer = answer_of(
        of.found.model, str(of.target), candidates, outcomes, base, of.impossible, folder.cuts()
    )
    command = _command(run, answer.take)
    answer = with_hint(replace(answer, command=command, environment=folder.environment()), hint)
    write_answer(folder, answer, of.found, outcomes, run.rows.held_out, run.tokenizer)
    yield answer


def _resumed(asked: Request, target: Path | None) -> tuple[Request, Path]:
    """(what an unfinished comparison was asked for, its folder). `--resume DIR` is read as a switch and the first
    argument, so without -o that argument is the folder.

    Raises RequestError when it is not a comparison, or was asked for something else.
    """
    alone = target is None
    if target is None:
        name = asked.flags.get("model")
        if not name:
            raise RequestError("--resume needs the comparison's folder", "lorafit compare --resume DIR")
        target = Path(name).expanduser()
    folder = CompareFolder(target)
    folder.open(resume=True)
    stored = Request.of(folder.request())
    given = replace(asked, flags={n: v for n, v in asked.flags.items() if not (alone and n == "model")})
    if given != Request({}) and (odd := stored.differs(given.checked())):
        raise RequestError(
            f"`{target}` was asked for with another {odd}",
            f"lorafit compare --resume {shlex.quote(str(target))} alone",
        )
    return stored, target


def _command(run: Compared, take: str) -> str:
    """The command that trains the choice in full; empty where there is none."""
    one = next((c for c in run.ahead.candidates if c.choice == take), None)
    if one is None:
        return ""
    return train_command(full_settings(one, run.of.common), one.config, run.asked.config)
