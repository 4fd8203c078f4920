"""Which candidate is best, and how sure that is: paired differences over rows, the spread over seeds, Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, lgamma, log, log1p, sqrt

import numpy as np

LEVEL = 0.05  # the probability of calling any choice worse that is not


@dataclass(frozen=True, slots=True)
class Ranked:
    """One choice of strategy, band and settings over its seeds, against the one with the lowest loss.

    `stderr` is the standard error of `delta` over the rows, paired, and `seed_stderr` over seeds (None with one
    seed); `p` is corrected for the number of comparisons. `worse`: the difference is beyond both.
    """

    choice: str
    loss: float
    losses: tuple[float, ...]
    delta: float = 0.0
    stderr: float = 0.0
    seed_stderr: float | None = None
    p: float = 1.0
    worse: bool = False

    @property
    def spread(self) -> float | None:
        """The standard deviation of the loss over seeds; None with one seed."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else None

    @property
    def error(self) -> float:
        """The standard error of the difference, of rows and seeds together."""
        return sqrt(self.stderr**2 + (self.seed_stderr or 0.0) ** 2)


def rank(rows: Mapping[str, Sequence[Sequence[float]]], weights: Sequence[float]) -> list[Ranked]:
    """The choices from the lowest held-out loss to the highest.

    `rows` has, by choice, the summed loss of each row for each seed: (seeds, rows); `weights` is what each row counts,
    (rows,). A choice's loss is the mean over its seeds. The difference to the lowest is a ratio over rows with the
    standard error of `paired_score`; the variance over seeds is pooled over all choices, which have the same kind of
    noise and few seeds each. Both add up to the error that the difference is divided by; its p comes from Student's t
    with Welch and Satterthwaite's degrees of freedom, corrected as Holm does (A simple sequentially rejective multiple
    test procedure, 1979) for as many comparisons as there are choices beside the best.
    """
    n = np.asarray(weights, dtype=np.float64)
    total, count = float(n.sum()), len(n)
    of = {choice: np.asarray(found, dtype=np.float64) for choice, found in rows.items()}
    losses = {choice: found.sum(1) / total for choice, found in of.items()}
    order = sorted(of, key=lambda choice: float(losses[choice].mean()))
    best = order[0]
    several = [found for found in losses.values() if len(found) > 1]
    free = sum(len(found) - 1 for found in several)
    pooled = sum(float(found.var(ddof=1)) * (len(found) - 1) for found in several) / free if free else None
    made = []
    for choice in order:
        delta, stderr = difference(of[choice], of[best], n)
        seeds = None
        if pooled is not None and choice != best:
            seeds = sqrt(pooled * (1 / len(losses[choice]) + 1 / len(losses[best])))
        p = 1.0 if choice == best else _p(delta, stderr, seeds, count, free)
        made.append(
            Ranked(
                choice,
                float(losses[choice].mean()),
                tuple(map(float, losses[choice])),
                delta,
                stderr,
                seeds,
                p,
            )
        )
    return _corrected(made)


def difference(own: np.ndarray, other: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """(mean difference per token, its standard error over the rows) of two choices, each (seeds, rows); the ratio of
    `paired_score`."""
    apart, count, total = own.mean(0) - other.mean(0), len(weights), float(weights.sum())
    delta = float(apart.sum() / total)
    spread = float(((apart - delta * weights) ** 2).sum())
    return delta, sqrt(count / (count - 1) * spread) / total if count > 1 else 0.0


def _p(delta: float, stderr: float, seeds: float | None, rows: int, free: int) -> float:
    """The two-sided probability of such a difference where there is none."""
    if rows < 2:
        return 1.0
    variance = stderr**2 + (seeds or 0.0) ** 2
    if not variance:
        return 0.0 if delta else 1.0
    below = stderr**4 / (rows - 1) + ((seeds**4 / free) if seeds else 0.0)
    return student(abs(delta) / sqrt(variance), variance**2 / below if below else inf)


def _corrected(ranked: Sequence[Ranked]) -> list[Ranked]:
    """The same with Holm's p: the smallest times the number of comparisons, the next times one less, never falling."""
    others = sorted(range(1, len(ranked)), key=lambda at: ranked[at].p)
    found, least = list(ranked), 0.0
    for done, at in enumerate(others):
        least = max(least, min(1.0, ranked[at].p * (len(others) - done)))
        found[at] = replace(ranked[at], p=least, worse=least < LEVEL)
    return found


def student(t: float, freedom: float) -> float:
    """The probability that |T| is above t, for Student's t: the regularised incomplete beta function
    I_x(v/2, 1/2) at x = v / (v + t^2), by its continued fraction (Numerical Recipes, 3rd ed., sec. 6.4)."""
    freedom = min(freedom, 1e7)
    a, b, x = freedom / 2, 0.5, freedom / (freedom + t * t)
    if x >= 1:
        return 1.0
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    found = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            found *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return found


def front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names for which no other has both numbers as low or lower, and one of them lower (Pareto)."""

    def beaten(own: tuple[float, float]) -> bool:
        return any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in points.values())

    return {name for name, own in points.items() if not beaten(own)}


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation; ties get the mean of their ranks. None where one of both does not vary."""
    a, b = (np.array(_ranks(values)) for values in (one, other))
    if len(a) < 2 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < own for v in values) + (sum(v == own for v in values) - 1) / 2 for own in values]
