from math import inf

import numpy as np
import pytest

from lorafit.compare.ranking import correlation, front, rank, student
from lorafit.evaluate.paired import RowScore, paired_score


@pytest.mark.parametrize(
    "t, freedom, p",
    [
        (2.262, 9, 0.05),
        (12.706, 1, 0.05),
        (4.303, 2, 0.05),
        (1.96, inf, 0.05),
        (0.0, 5, 1.0),
        (3.291, 1e9, 0.001),
    ],
)
def test_students_t_is_that_of_the_tables(t, freedom, p):
    assert student(t, freedom) == pytest.approx(p, abs=2e-4)


def rows(mean, seeds=1, count=200, seed=0, noise=0.02, shift=0.0):
    """Losses of rows that are hard or easy for every choice alike; seeds shift all rows of a run."""
    hard = np.random.default_rng(99).exponential(1.0, count)
    own = np.random.default_rng(seed)
    return [list(hard + mean + own.normal(0, noise, count) + own.normal(0, shift)) for _ in range(seeds)]


def test_the_difference_is_that_of_a_paired_score():
    weights = list(np.random.default_rng(1).integers(1, 9, 50).astype(float))
    found = rank({"a": rows(0.0, count=50), "b": rows(0.1, count=50, seed=5)}, weights)
    scores = [
        [RowScore(x, int(w), 0) for x, w in zip(r[0], weights, strict=True)]
        for r in (rows(0.0, count=50), rows(0.1, count=50, seed=5))
    ]
    wanted = paired_score("", *scores)
    assert [one.choice for one in found] == ["a", "b"]
    assert found[1].delta == pytest.approx(wanted.delta) and found[1].stderr == pytest.approx(wanted.stderr)


def test_what_is_hard_for_all_does_not_hide_a_difference():
    found = rank({"a": rows(0.0), "b": rows(0.02, seed=5)}, [1.0] * 200)
    assert found[1].worse and found[1].stderr < 0.003
    assert float(np.std(rows(0.0)[0])) / 200**0.5 > 0.05  # of which the spread over rows would see nothing


def test_more_comparisons_ask_for_more():
    """A difference that is beyond noise alone is not among twenty (Holm)."""
    pair = {"a": rows(0.0), "b": rows(0.006, seed=5)}
    alone = rank(pair, [1.0] * 200)[1]
    many = rank({**pair, **{f"c{n}": rows(0.004, seed=10 + n) for n in range(19)}}, [1.0] * 200)
    (among,) = (one for one in many if one.choice == "b")
    assert alone.worse and not among.worse and among.p > alone.p
    least = sorted(one.p for one in many[1:])
    assert least == [one.p for one in sorted(many[1:], key=lambda one: one.p)]


def test_a_difference_within_the_spread_of_seeds_is_noise():
    weights = [1.0] * 200
    calm = rank({"a": rows(0.0, 3, seed=1), "b": rows(0.02, 3, seed=2)}, weights)[1]
    wild = rank({"a": rows(0.0, 3, seed=1, shift=0.05), "b": rows(0.02, 3, seed=2, shift=0.05)}, weights)
    assert calm.worse and not wild[1].worse
    assert wild[1].seed_stderr > wild[1].stderr and wild[0].spread > 0


def test_false_alarms_are_as_rare_as_is_said():
    """Of comparisons among choices that are the same, one in twenty at most calls any worse than a fixed one."""
    alarms = 0
    for trial in range(200):
        made = {f"c{n}": rows(0.0, 2, seed=1000 * trial + n, shift=0.01) for n in range(3)}
        found = rank(made, [1.0] * 200)
        alarms += any(one.worse for one in found)
    assert alarms <= 20  # the best of them is picked, so somewhat more than 5 % may be


def test_one_row_and_one_choice():
    assert not rank({"a": [[1.0]], "b": [[2.0]]}, [1.0])[1].worse
    (only,) = rank({"a": [[1.0, 2.0]]}, [1.0, 1.0])
    assert only.loss == 1.5 and not only.worse


def test_the_front_holds_what_no_other_beats_in_both():
    assert front({"a": (1, 9), "b": (2, 2), "c": (3, 3), "d": (9, 1)}) == {"a", "b", "d"}


def test_rank_correlation():
    assert correlation([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 1, 1], [3, 2, 1]) is None
