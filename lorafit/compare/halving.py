"""Successive halving: all are trained a little, and the better part goes on.

Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization (2016), with one
change: none is dropped whose distance to the last that stays is not beyond noise.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.compare.ranking import LEVEL, rank
from lorafit.compare.results import Outcome

ROUNDS = 2  # before the last: after a quarter and a half of the steps


def shares() -> tuple[float, ...]:
    """The shares of the steps after which a round ends; the last is all of them."""
    return tuple(0.5**n for n in range(ROUNDS, -1, -1))


def halved(outcomes: Sequence[Outcome]) -> set[str]:
    """The choices that go on: the better half by held-out loss, rounded up, and every other whose paired difference
    to the last of that half is not beyond noise."""
    rows = rows_of(outcomes)
    if len(rows) < 3:
        return set(rows)
    weights = weights_of(outcomes)
    order = [found.choice for found in rank(rows, weights)]
    stay = order[: (len(order) + 1) // 2]
    for choice in order[len(stay) :]:
        _, other = rank({stay[-1]: rows[stay[-1]], choice: rows[choice]}, weights)
        if other.p >= LEVEL:
            stay = [*stay, choice]
    return set(stay)


def rows_of(outcomes: Sequence[Outcome]) -> dict[str, list[list[float]]]:
    """By choice, each row's summed loss for each of its seeds; choices of which a seed has no scores are left out."""
    found: dict[str, list[list[float]]] = {}
    short = {one.choice for one in outcomes if one.scores is None}
    for one in outcomes:
        if one.scores is not None and one.choice not in short:
            found.setdefault(one.choice, []).append([score.loss_sum for score in one.scores.rows])
    return found


def weights_of(outcomes: Sequence[Outcome]) -> list[float]:
    """What each held-out row counts."""
    scored = next((one.scores for one in outcomes if one.scores is not None), None)
    return [score.weight for score in scored.rows] if scored is not None else []
