"""The answer: the table of choices, which to take and why, in words, with the command that trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lorafit.compare.candidates import Candidate, Impossible, scale_note
from lorafit.compare.halving import rows_of, weights_of
from lorafit.compare.hint import Hint
from lorafit.compare.ranking import Ranked, correlation, difference, front, rank
from lorafit.compare.results import DROPPED, FAILED, FINISHED, Cut, Outcome, Scores
from lorafit.evaluate import RowScore, summed
from lorafit.units import count, figures, percent

LOWEST, EQUAL, WORSE = "lowest", "not distinguishable", "worse"


@dataclass(frozen=True, slots=True)
class Forgetting:
    """A choice on a text that it should not change: its loss less the base's, and the error of that over the rows."""

    file: str
    loss: float
    delta: float
    stderr: float


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """One choice over its seeds. `delta`, with its error, is to the lowest loss; `gain` to the base. `seconds` are of
    training steps; `fast` and `small` say that no other is better in loss and time, or in loss and parameters."""

    choice: str
    preset: str
    layers: str
    rank: int
    learning_rate: float
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    loss: float
    spread: float | None
    delta: float
    error: float
    p: float
    verdict: str
    gain: float
    gain_error: float
    accuracy: float
    trainable_params: int
    adapter_bytes: int
    seconds: float
    tokens_per_second: float
    peak: int
    growth: int
    steps: int
    also: tuple[Forgetting, ...] = ()
    fast: bool = False
    small: bool = False

    @property
    def named(self) -> str:
        """The choice in a sentence: `ffn` on `high`."""
        plain = self.choice == f"{self.preset}-{self.layers}".replace(",", "+")
        return f"`{self.preset}` on `{self.layers}`" if plain else f"`{self.choice}`"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out. `choices` by held-out loss; `take` is the one to train in full; `missing` are candidates that failed or were dropped, with the reason."""

    model: str
    folder: str
    rows: int
    tokens: int
    base_loss: float
    choices: tuple[ChoiceRow, ...]
    take: str
    words: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]
    impossible: tuple[Impossible, ...]
    cuts: tuple[Cut, ...] = ()
    command: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    hint: Hint | None = None
    environment: Mapping[str, str] = field(
        default_factory=dict, hash=False
    )  # versions, machine, first command, date
    hint_correlation: float | None = None  # of the hint's ranking with the measured one (Spearman)


def answer_of(
    model: str,
    folder: str,
    candidates: Sequence[Candidate],
    outcomes: Mapping[str, Outcome],
    base: Scores,
    impossible: Sequence[Impossible],
    cuts: Sequence[Cut] = (),
) -> Answer:
    """The answer of the candidates that finished."""
    finished = [o for o in outcomes.values() if o.status == FINISHED]
    rows, weights = rows_of(finished), weights_of(finished)
    ranked = rank(rows, weights) if rows else []
    made = [
        _row(one, candidates, outcomes, base, np.asarray(rows[one.choice]), np.asarray(weights))
        for one in ranked
    ]
    if made:
        made[0] = replace(made[0], verdict=LOWEST)
    fast = front({c.choice: (c.loss, c.seconds) for c in made})
    small = front({c.choice: (c.loss, float(c.trainable_params)) for c in made})
    choices = tuple(replace(c, fast=c.choice in fast, small=c.choice in small) for c in made)
    take = taken(choices)
    missing = [(name, o.reason) for name, o in outcomes.items() if o.status in (FAILED, DROPPED)]
    return Answer(
        model,
        folder,
        len(base.rows),
        sum(score.tokens for score in base.rows),
        summed(base.rows).loss,
        choices,
        take,
        tuple(words(choices, take)),
        tuple(missing),
        tuple(impossible),
        tuple(cuts),
        seconds=sum(o.seconds for o in outcomes.values()),
        notes=tuple(filter(None, [*_notes(choices), scale_note(candidates)])),
    )


def with_hint(answer: Answer, hint: Hint | None) -> Answer:
    """The answer with the hint that came before it, and how well it ranked the choices."""
    if hint is None:
        return answer
    known = [c for c in answer.choices if c.choice in hint.scores]
    found = correlation([hint.scores[c.choice] for c in known], [-c.loss for c in known])
    return replace(answer, hint=hint, hint_correlation=found)


def _row(
    one: Ranked,
    candidates: Sequence[Candidate],
    outcomes: Mapping[str, Outcome],
    base: Scores,
    rows: np.ndarray,
    weights: np.ndarray,
) -> ChoiceRow:
    finished = {name for name, outcome in outcomes.items() if outcome.status == FINISHED}
    own = [c for c in candidates if c.choice == one.choice and c.name in finished]
    first, results = own[0], [outcomes[c.name] for c in own]
    scores = [o.scores for o in results if o.scores is not None]
    gain, gain_error = difference(rows, _losses([base.rows]), weights)
    return ChoiceRow(
        choice=one.choice,
        preset=first.plan.preset,
        layers=first.plan.spec,
        rank=first.plan.lora.r,
        learning_rate=first.config.learning_rate or 0.0,
        seeds=tuple(c.config.seed for c in own),
        runs=tuple(c.name for c in own),
        loss=one.loss,
        spread=one.spread,
        delta=one.delta,
        error=one.error,
        p=one.p,
        verdict=WORSE if one.worse else EQUAL,
        gain=gain,
        gain_error=gain_error,
        accuracy=sum(summed(s.rows).accuracy for s in scores) / len(scores),
        trainable_params=first.plan.trainable_params,
        adapter_bytes=first.plan.adapter_bytes,
        seconds=sum(o.seconds for o in results) / len(results),
        tokens_per_second=sum(o.tokens_per_second for o in results) / len(results),
        peak=max(o.peak for o in results),
        growth=max(o.growth for o in results),
        steps=max(o.steps for o in results),
        also=tuple(_forgetting(file, scores, base) for file in base.also),
    )


def _forgetting(file: str, scores: Sequence[Scores], base: Scores) -> Forgetting:
    weights = np.asarray([s.weight for s in base.also[file]])
    own = _losses([s.also[file] for s in scores])
    delta, stderr = difference(own, _losses([base.also[file]]), weights)
    return Forgetting(file, float(own.mean(0).sum() / weights.sum()), delta, stderr)


def _losses(scores: Sequence[Sequence[RowScore]]) -> np.ndarray:
    """(seeds, rows) of summed losses."""
    return np.asarray([[s.loss_sum for s in rows] for rows in scores], dtype=np.float64)


def taken(choices: Sequence[ChoiceRow]) -> str:
    """The fastest of those within one standard error of the lowest loss: the rule of Breiman, Friedman, Olshen and
    Stone, Classification and Regression Trees (1984), sec. 3.4.3. Empty where there is none."""
    near = [c for c in choices if c.verdict != WORSE and c.delta <= c.error]
    return min(near, key=lambda c: c.seconds).choice if near else ""


def words(choices: Sequence[ChoiceRow], take: str) -> list[str]:
    """What came out, a sentence or two first."""
    if not choices:
        return ["No candidate finished."]
    low, own = choices[0], next(c for c in choices if c.choice == take)
    after = f"after {count(own.steps)} step{'s' * (own.steps != 1)}"
    loss = f"held-out loss {own.loss:.4f} {after}, {_against_base(own)}"
    equal = [c for c in choices if c.verdict == EQUAL and c is not own]
    worse = [c for c in choices if c.verdict == WORSE]
    said = []
    if own is not low:
        said.append(
            f"Take {own.named}: {loss}. {low.named} is {own.loss - low.loss:.4f} lower, but not beyond noise, and "
            f"{_takes(low, own)}."
        )
    else:
        said.append(f"{own.named} is best: {loss}.")
        quick = min(equal, key=lambda c: c.seconds, default=own)
        if quick.seconds < own.seconds:
            equal.remove(quick)
            said.append(
                f"{quick.named} is {quick.delta:.4f} higher, but not beyond noise, and {_takes(quick, own)}."
            )
    if worse and len(worse) == len(choices) - 1:
        others = f"All {len(worse)} others are" if len(worse) > 1 else f"{worse[0].named} is"
        one_seed = all(len(c.seeds) < 2 for c in choices)
        said.append(
            f"{others} worse beyond {'the noise of the held-out rows' if one_seed else 'both noises'}."
        )
    elif equal:
        names = ", ".join(c.named for c in equal[:3]) + (
            f" and {len(equal) - 3} more" if len(equal) > 3 else ""
        )
        said.append(f"Not distinguishable from the lowest loss on these rows: {names}.")
    return said


def _takes(one: ChoiceRow, other: ChoiceRow) -> str:
    """What one choice costs against another: its time, where that differs, else its parameters."""
    time = figures(one.seconds / other.seconds, 2) if other.seconds else "1.0"
    if time != "1.0" or one.trainable_params == other.trainable_params:
        return f"takes {time} × the time" if time != "1.0" else "takes as long"
    return f"trains {figures(one.trainable_params / other.trainable_params, 2)} × the parameters in the same time"


def _against_base(own: ChoiceRow) -> str:
    if abs(own.gain) <= 2 * own.gain_error:
        return "not distinguishable from the base"
    return f"{abs(own.gain):.4f} ± {own.gain_error:.4f} {'below' if own.gain < 0 else 'above'} the base"


def _notes(choices: Sequence[ChoiceRow]) -> list[str]:
    notes = []
    if choices and all(len(c.seeds) < 2 for c in choices):
        notes.append(
            "one seed: noise over seeds is not measured, so small differences may be chance; --seeds 3 measures it"
        )
    if choices and choices[0].gain > 0:
        notes.append(
            f"no candidate is below the base: fewer steps or a lower rate may suit this data ({percent(choices[0].gain, choices[0].loss - choices[0].gain)} above it)"
        )
    return notes
