"""What a comparison will take before it starts: seconds, memory and disk of each candidate, and how many steps fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafit.adapter import files_of_tokenizer
from lorafit.compare.candidates import Candidate, check_shared, scale_note
from lorafit.errors import RequestError
from lorafit.estimate import Estimate, Forecast, Timing, prepare
from lorafit.events import DataReport
from lorafit.forward import refused_by_map
from lorafit.model import ModelMap, ModelSource
from lorafit.settings import RunConfig
from lorafit.units import seconds_text

EACH = 0.4  # seconds that a candidate takes beside its passes: putting it in, saving, its page
FEWEST = 10  # steps of a candidate, at least: fewer tell nothing
FILES = 300_000  # bytes of a run's folder beside adapter and tokenizer: settings, events, page, held-out rows

Tick = Callable[[float, float], None]


@dataclass(frozen=True, slots=True)
class Ahead:
    """The candidates with their settings completed, and what each will cost; `fill` is the seconds of the one pass
    that makes the states of all cuts, `states` their bytes."""

    candidates: tuple[Candidate, ...]
    costs: Mapping[str, Estimate]
    seconds: Mapping[str, float]
    fill: float
    states: int
    forecasts: Mapping[str, Forecast]
    notes: tuple[str, ...] = ()
    workers: int = 1  # candidates at a time
    tokenizer: int = 0  # bytes of its files
    timing: Timing | None = None  # of the first candidate: the others' follow from it

    def as_json(self) -> dict[str, Any]:
        """The document of `--plan --json`."""
        rows = []
        for one in self.candidates:
            cost = self.costs[one.name]
            rows.append(
                {
                    "name": one.name,
                    "choice": one.choice,
                    "preset": one.plan.preset,
                    "layers": one.plan.spec,
                    "rank": one.plan.lora.r,
                    "learning_rate": one.config.learning_rate,
                    "seed": one.config.seed,
                    "trainable_params": one.plan.trainable_params,
                    "adapter_bytes": one.plan.adapter_bytes,
                    "steps": cost.steps,
                    "seconds": self.seconds[one.name],
                    "peak_memory": cost.memory.peak,
                }
            )
        return {"candidates": rows, "seconds": self.total, "peak_memory": self.peak, "disk": self.disk}

    @property
    def total(self) -> float:
        """Seconds of the whole comparison."""
        return self.fill + max(sum(self.seconds.values()) / self.workers, *self.seconds.values(), 0.0)

    @property
    def lowest(self) -> Candidate:
        """The candidate whose band begins lowest: of a base with streamed layers, those from there on are held."""
        return min(self.candidates, key=lambda one: min(layer for _, layer in one.cut))

    @property
    def peak(self) -> int:
        """Bytes at the peak: of the largest candidates at a time, one base, and the states of all cuts; or while
        streamed layers run once."""
        costs = [cost.memory for cost in self.costs.values()]
        largest = sorted(m.peak - m.prefix_cache - m.weights - m.filling for m in costs)
        shared = max(m.weights for m in costs)  # one base for all workers
        filling = max(m.peak - m.prefix_cache for m in costs)
        return max(sum(largest[-self.workers :]) + shared, filling) + self.states

    @property
    def disk(self) -> int:
        """Bytes that all run folders take."""
        return sum(one.plan.adapter_bytes + self.tokenizer + FILES for one in self.candidates)


def look_ahead(
    source: ModelSource,
    found: ModelMap,
    candidates: Sequence[Candidate],
    look: DataReport,
    budget: float | None = None,
    tick: Tick = lambda done, total: None,
    workers: int = 1,
    most: int | None = None,
) -> Ahead:
    """The forecast of all candidates, as `plan` makes it, with one timing for all; within `budget` seconds, where one
    is set: all take as many steps as then fit. `most` is what that came to when the comparison began.

    Raises RequestError where fewer than FEWEST steps do.
    """
    made = _forecast(source, found, candidates, look, tick, workers)
    where, why = _residency(found, made)
    candidates = tuple(
        replace(one, config=one.config.settled("prefix_residency", "auto", where, why))
        for one in made.candidates
    )
    if all(cost.residency[0] == where for cost in made.costs.values()):
        made = replace(made, candidates=candidates)
    else:
        made = _forecast(source, found, candidates, look, tick, workers, made.timing)
    steps = {name: cost.steps or 1 for name, cost in made.costs.items()}
    if budget is not None:
        most = _fitting(made, budget)
    if most is None or most >= max(steps.values()):
        return made
    cut = [replace(one, config=_limited(one, most)) for one in made.candidates]
    return _forecast(source, found, cut, look, tick, workers, made.timing)


def _fitting(made: Ahead, budget: float) -> int:
    """The steps that each candidate may take for all of it to fit into `budget` seconds. Raises RequestError where
    these are fewer than FEWEST."""
    steps = {name: cost.steps or 1 for name, cost in made.costs.items()}
    workers, candidates = made.workers, made.candidates
    beside = made.fill + EACH * len(candidates) / workers
    each = sum((made.seconds[name] - EACH) / steps[name] for name in steps) / workers
    fit = int((budget - beside) / each) if each else max(steps.values())
    if fit < FEWEST:
        least = beside + FEWEST * each
        raise RequestError(
            f"--budget {seconds_text(budget)} allows {max(0, fit)} steps for each of {len(candidates)} candidates, and "
            f"{FEWEST} is the least",
            f"--budget {round(least) + 1}s, or fewer candidates",
        )
    return fit


def _residency(found: ModelMap, made: Ahead) -> tuple[str, str]:
    """(where the layers below the lowest band are, why), for all candidates: `auto` streams them where one of the
    candidates would not fit otherwise, and none of the bands begins at the first layer."""
    if any(refused_by_map(found, one.plan.cut) for one in made.candidates):
        return "resident", "they cannot be streamed for all candidates"
    return max((cost.residency for cost in made.costs.values()), key=lambda way: way[0] == "stream")


def _limited(one: Candidate, steps: int) -> RunConfig:
    """The settings with that many steps at most."""
    config = one.config
    least = min(steps, config.max_steps or steps)
    return replace(config, max_steps=least, origin={**config.origin, "max_steps": "derived: to fit --budget"})


def _forecast(
    source: ModelSource,
    found: ModelMap,
    candidates: Sequence[Candidate],
    look: DataReport,
    tick: Tick,
    workers: int,
    timing: Timing | None = None,
) -> Ahead:
    done, costs, seconds, forecasts, notes = [], {}, {}, {}, []
    first: tuple[Candidate, Forecast] | None = None
    states: dict[tuple[tuple[str, int], ...], int] = {}
    fill = 0.0
    for number, one in enumerate(candidates):
        ahead, config = prepare(
            one.config, source, found, look=look, seconds=1.0, threads=1 if workers > 1 else 0
        )
        one = replace(one, config=config)
        if first is None:
            first, timing = (one, ahead), timing or ahead.timing(one.plan)
        scaled = first[1].scaled(timing, first[0].plan, one.plan, ahead.shape)
        cost = ahead.estimate(one.plan, scaled)
        done.append(one)
        costs[one.name], forecasts[one.name] = cost, ahead
        notes += ahead.notes
        whole, replayed = cost.seconds_per_epoch or 0.0, cost.seconds_per_epoch_replayed
        shares = replayed is not None and config.prefix_cache != "off" and any(cut for _, cut in one.cut)
        if shares and replayed is not None:
            states[one.cut] = cost.prefix_cache.bytes
            fill = max(fill, whole - replayed + cost.prefix_residency.seconds)
        passes = (replayed if shares and replayed is not None else whole) * (cost.epochs or 1.0)
        # held-out rows are scored three times, forward only: a third of a training pass
        beside = whole / max(1, look.tokens) * look.held_out_tokens
        seconds[one.name] = passes + beside + EACH
        tick(number + 1, len(candidates))
    check_shared(done)  # a batch size that follows from the rows follows from `accumulate` too
    if scales := scale_note(done):
        notes.append(scales)
    return Ahead(
        candidates=tuple(done),
        costs=costs,
        seconds=seconds,
        fill=fill,
        states=sum(states.values()),
        forecasts=forecasts,
        notes=tuple(dict.fromkeys(notes)),
        tokenizer=sum(path.stat().st_size for path in files_of_tokenizer(source.place) if path.is_file()),
        timing=timing,
        workers=workers,
    )


def parse_duration(text: str, flag: str = "--budget") -> float:
    """`10m`, `90s`, `1h`, `1h30m` in seconds. Raises RequestError for anything else, a number without a unit among
    it."""
    match = re.fullmatch(
        r"\s*(?:(\d+(?:\.\d+)?)h)?\s*(?:(\d+(?:\.\d+)?)m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)s)?\s*", text
    )
    found = [float(part or 0) for part in match.groups()] if match else [0.0]
    if not sum(found):
        raise RequestError(f"{flag} is `{text}`: it takes a time with its unit", "e.g. 10m, 90s or 1h30m")
    return 3600 * found[0] + 60 * found[1] + found[2]
