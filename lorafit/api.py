"""lorafit from Python: the commands as functions. Their arguments are the commands' options, and they print nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from inspect import Parameter, Signature, signature
from os import PathLike, fspath
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from lorafit.distributed import connect
from lorafit.errors import Interrupted, LorafitError, RequestError, RunError, closest
from lorafit.operations import COMPARES, EVALUATES, MERGES, PLANS, TRAINS, check_own, ours
from lorafit.settings import OPTIONS
from lorafit.system import quiet_libraries

if TYPE_CHECKING:
    from lorafit.adapter import Plan
    from lorafit.compare import Ahead, Impossible
    from lorafit.compare import (
        Answer as Answer,  # these four are named in texts, where ruff does not find them
    )
    from lorafit.compare import Happening as Happening
    from lorafit.distributed import World
    from lorafit.estimate import Estimate
    from lorafit.events import DataReport
    from lorafit.events import Event as Event
    from lorafit.events import TrainReport as TrainReport
    from lorafit.model import ModelMap
    from lorafit.operations import Compared, Planned, Prepared
    from lorafit.results import EvalReport, MergeReport
    from lorafit.settings import RunConfig

quiet_libraries()

P = ParamSpec("P")
E = TypeVar("E")
T = TypeVar("T")
Place = str | PathLike[str]  # a name or a path
Value = Place | int | float
Values = Value | Sequence[Value] | None  # of an option that may be given several times


def _takes(*names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Give a function these options of a run as keywords, as `help()` shows them. It raises RequestError for an
    unknown one; a path is given on as text, and None is an option that is not given."""

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        own = [p for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        taken = {p.name for p in own if p.kind is not Parameter.VAR_POSITIONAL}
        defaults = {p.name: p.default for p in own if p.kind is Parameter.KEYWORD_ONLY}
        rest = [name for name in names if name not in taken]
        known, several = {*taken, *rest}, {name for name in rest if OPTIONS[name].many}

        @wraps(function)
        def checked(*arguments: P.args, **options: P.kwargs) -> T:
            for name in options:
                if name not in known:
                    raise RequestError(f"there is no option `{name}`", _instead(name, known))
                if name in defaults and options[name] is not None:
                    check_own(name, options[name], defaults[name])
            given: Any = {n: _plain(v, n in several) for n, v in options.items() if v is not None}
            places: Any = map(_plain, arguments)
            return function(*places, **given)

        shown = [Parameter(n, Parameter.KEYWORD_ONLY, default=OPTIONS[n].default) for n in rest]
        checked.__signature__ = Signature([*own, *shown])  # type: ignore[attr-defined]
        return checked

    return wrap


def _plain(value: Any, several: bool = False) -> Any:
    """A path as text, also in a list; one of what may be `several` in a list."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = fspath(value) if isinstance(value, PathLike) else value
    return [value] if several else value


def _instead(name: str, known: set[str]) -> str:
    """What an unknown option is called here, in Python's spelling."""
    flags = {f"--{each.replace('_', '-')}" for each in known}
    otherwise = "`lorafit.train` takes it" if name in OPTIONS else "help() of the function lists them"
    hint = ours(name, flags) or closest(name, known, otherwise)
    return re.sub(r"--([a-z][a-z-]*)", lambda flag: f"`{flag[1].replace('-', '_')}`", hint)


def _texts(value: Any) -> tuple[str, ...]:
    """One value or several, as texts."""
    if value is None:
        return ()
    return tuple(str(each) for each in (value if isinstance(value, (list, tuple)) else (value,)))


@_takes()
def inspect(model: Place = "demo") -> ModelMap:
    """The layers of a model, and the role and size of every weight, from its config alone.

    `model` is a Hub id, a folder, a `config.json` or `demo`. Raises RequestError.
    """
    from lorafit.model import chart_of, find

    return chart_of(find(str(model)))


@_takes(*PLANS)
def plan(
    model: Place | None = None,
    *,
    config: Place | None = None,
    fit: str | None = None,
    processes: int | None = None,
    probe: bool = True,
    fresh: bool = False,
    estimate: bool = True,
    **options: Any,
) -> Planned:
    """What would be adapted (`plan`), and what it costs (`data`, `estimate`, `fit`). No weights are read.

    Raises RequestError for what `train` would refuse.
    """
    from lorafit.operations import plan_run

    return plan_run(
        _flags(model, options),
        _text(config),
        fit=_text(fit),
        processes=processes,
        probe=probe,
        fresh=fresh,
        estimate=estimate,
    )


@_takes(*TRAINS)
def train(
    model: Place | None = None, *, config: Place | None = None, force: bool = False, **options: Any
) -> Run:
    """A run, ready to train: iterate over its events, or call its `report()`.

    The rows are read and the cost is foreseen here; the model is loaded with the first event. Raises RequestError
    for what is wrong before that.
    """
    from lorafit.operations import Finished, check_memory, prepare_run, resolve_run

    world = connect()
    with world.one_error():
        resolved = resolve_run(world, _flags(model, options), _text(config))
        if isinstance(resolved, Finished):
            raise RequestError(
                f"`{resolved.folder}` is a finished run: there is nothing to resume",
                "lorafit.evaluate(…), or train again with `overwrite=True`",
            )
        prepared = prepare_run(world, resolved)
        warning = check_memory(prepared, force) if world.first else ""
    return Run(world, prepared, warning)


class Running(Generic[E, T]):
    """Something that runs as it is iterated over, and gives its events. A loop that was left goes on where it was.

    Raises RunError when it fails, OutOfMemory when memory runs out.
    """

    def __init__(self, events: Callable[[Callable[[], int]], Iterator[E | T]], last: type[T]) -> None:
        self._signal = 0
        self._last, self._report = last, cast("T | None", None)
        self._error: LorafitError | None = None
        self._events = self._watched(events(lambda: self._signal))

    def __iter__(self) -> Iterator[E | T]:
        return self._events

    def stop(self) -> None:
        """End it after the step that it is in. The state is saved: `resume=True` goes on from there."""
        self._signal = SIGINT

    def report(self) -> T:
        """Run to the end; what it amounts to. Raises Interrupted where `stop` has ended it."""
        for _ in self._events:
            pass
        if self._report is None:
            raise self._error or RunError("the run has not finished", "its folder says how far it came")
        return self._report

    def _watched(self, events: Iterator[E | T]) -> Iterator[E | T]:
        """The events; they end where it was asked to stop."""
        try:
            for event in events:
                if isinstance(event, self._last):
                    self._report = event
                yield event
        except LorafitError as error:
            self._error = error
            if not isinstance(error, Interrupted):
                raise


class Run(Running["Event", "TrainReport"]):
    """A run that is ready to train. Its events are those of `lorafit.events`, `Started` the first and `TrainReport`
    the last."""

    def __init__(self, world: World, prepared: Prepared, warning: str) -> None:
        from lorafit.events import TrainReport
        from lorafit.operations import train_events

        super().__init__(lambda stop: train_events(world, prepared, stop), TrainReport)
        self.plan: Plan = prepared.plan
        self.settings: RunConfig = prepared.settings
        self.data: DataReport = prepared.rows.look
        self.estimate: Estimate = prepared.cost
        self.notes = tuple(filter(None, (*dict.fromkeys(prepared.ahead.notes), warning)))


class Comparison(Running["Happening", "Answer"]):
    """A comparison that is ready to run. `Began` and `Ended` of `lorafit.compare` are a candidate's first and last
    event, and the `Answer` is the last of all."""

    def __init__(self, prepared: Compared, resume: bool, warning: str) -> None:
        from lorafit.compare import Answer
        from lorafit.operations import compare_events

        super().__init__(lambda stop: compare_events(prepared, resume, stop), Answer)
        self.ahead: Ahead = prepared.ahead
        self.impossible: Sequence[Impossible] = prepared.of.impossible
        self.notes = tuple(filter(None, (*prepared.ahead.notes, warning)))


@_takes(*COMPARES)
def compare(
    model: Place | None = None,
    *,
    presets: Values = None,
    layers: Values = None,
    ranks: Values = None,
    trainable: Value | None = None,
    grid: Place | None = None,
    also: Values = None,
    learning_rates: Values = None,
    seeds: Values = None,
    budget: str | None = None,
    halving: bool = False,
    hint: bool = False,
    workers: int = 1,
    resume: bool = False,
    config: Place | None = None,
    **options: Any,
) -> Comparison:
    """Many candidates over the same rows, ready to run: iterate over its events, or call its `report()`.

    `ahead` says what it costs, `impossible` what cannot be trained. Raises RequestError.
    """
    from lorafit.compare import Request
    from lorafit.operations import check_peak, prepare_comparison, resolve_comparison

    flags = _flags(model, options)
    target = Path(flags.pop("output")).expanduser() if "output" in flags else None
    asked = Request(
        flags,
        presets=_texts(presets), layers=_texts(layers), ranks=_texts(ranks), learning_rates=_texts(learning_rates),
        seeds=_texts(seeds), grid=_text(grid), config=_text(config), budget=_text(budget), trainable=_text(trainable),
        also=_texts(also), halving=halving, hint=hint,
    )  # fmt: skip
    prepared = prepare_comparison(resolve_comparison(asked, target, resume), workers)
    return Comparison(prepared, resume, check_peak(prepared.ahead))


@_takes(*EVALUATES)
def evaluate(
    *adapters: Place | Sequence[Place],
    by: str | None = None,
    also: Values = None,
    samples: int = 3,
    prompt: Values = None,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    rows: int = 2,
    tasks: str | None = None,
    limit: int = 0,
    model: Place | None = None,
    report: Place | None = None,
    **options: Any,
) -> EvalReport:
    """Base and adapters over the same rows: those of `data`, or the ones that the run held out. A model, alone, is
    scored. Several adapters may be a list.

    As on the command line, the page of the first adapter's run is written again. Raises RequestError.
    """
    from lorafit.operations import evaluate_adapters

    names = [name for each in adapters for name in _texts(each)]
    if not names:
        raise RequestError("evaluate needs an adapter or a model", 'lorafit.evaluate("runs/…")')
    return evaluate_adapters(
        names,
        options,
        by=_text(by),
        also=_texts(also),
        samples=samples,
        prompt=_texts(prompt),
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        rows=rows,
        tasks=_text(tasks),
        limit=limit,
        model=_text(model),
        report=_text(report),
    )


@_takes(*MERGES)
def merge(
    run: Place | None = None,
    *,
    output: Place | None = None,
    adapter: Values = None,
    model: Place | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    verify: bool = True,
    **options: Any,
) -> MergeReport:
    """Merge adapters into their base, as a model folder that is verified. `adapter` are more of them, as `PATH` or
    `PATH=WEIGHT`.

    Raises RequestError, and RunError where the result does not verify.
    """
    from lorafit.operations import merge_named

    report, _ = merge_named(
        _text(run),
        options,
        adapter=_texts(adapter),
        model=_text(model),
        output=_text(output),
        dtype=_text(dtype),
        max_shard_size=_text(max_shard_size),
        verify=verify,
    )
    return report


def _text(place: Value | None) -> str | None:
    return None if place is None else str(place)


def _flags(model: Place | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run, with the model where it is given."""
    return options if model is None else {"model": str(model), **options}
