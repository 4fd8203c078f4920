"""Two models over the same rows: the paired difference, its standard error and interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from lorafit.events import Loss
from lorafit.results import AdapterScore, Score

DRAWS, COVERED = 2000, 0.95  # resamplings of the rows behind an interval, and what it covers


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row: its summed loss in nats, its supervised tokens, how many of them were the most likely
    one; `short` where it is a prompt with one answer of few tokens. `weighted` is the sum of its tokens'
    weights in `loss_sum`; None where each token counts 1."""

    loss_sum: float
    tokens: int
    correct: int
    short: bool = False
    weighted: float | None = None

    @property
    def weight(self) -> float:
        """What the summed loss is divided by."""
        return self.tokens if self.weighted is None else self.weighted

    @property
    def exact(self) -> bool:
        """Whether decoding greedily says the answer token for token: where each token of it is the
        most likely one after those before it, and only there."""
        return self.correct == self.tokens


def summed(scores: Sequence[RowScore]) -> Score:
    """The rows together: loss and perplexity per supervised token, accuracy, exact match."""
    tokens = sum(s.tokens for s in scores)
    loss = Loss(sum(s.loss_sum for s in scores) / sum(s.weight for s in scores), tokens)
    short = [s.exact for s in scores if s.short]
    accuracy = sum(s.correct for s in scores) / tokens
    return Score(loss.loss, loss.perplexity, accuracy, sum(short) / len(short) if short else None)


def paired_score(path: str, base: Sequence[RowScore], adapter: Sequence[RowScore]) -> AdapterScore:
    """An adapter against the base over the same rows.

    With d_i the difference of row i's summed loss and n_i its tokens (or their weights' sum), delta = sum d / sum n, a ratio;
    its standard error is sqrt(R/(R-1) * sum (d_i - delta*n_i)^2) / sum n over R rows (Cochran,
    Sampling Techniques, 3rd ed., sec. 6.4). 0 where there is one row. The interval is the percentile
    bootstrap's (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13): rows are drawn with
    their pair of losses, so what makes a row hard for both does not widen it.
    """
    rows = len(base)
    tokens = np.array([s.weight for s in base], dtype=np.float64)
    differences = np.array([a.loss_sum - b.loss_sum for a, b in zip(adapter, base, strict=True)])
    delta = float(differences.sum() / tokens.sum())
    spread = float(((differences - delta * tokens) ** 2).sum())
    stderr = sqrt(rows / (rows - 1) * spread) / float(tokens.sum()) if rows > 1 else 0.0
    low, high = resampled(differences, tokens)
    score = summed(adapter)
    return AdapterScore(
        score.loss, score.perplexity, score.accuracy, score.exact, path, delta, stderr, low, high
    )


def resampled(differences: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """The ends of the interval that `COVERED` of the resampled ratios lie in; the same each time."""
    generator = np.random.default_rng(0)
    rows, ratios = len(tokens), []
    together = max(1, 4_000_000 // rows)  # draws at once: 32 MB of row numbers
    for start in range(0, DRAWS, together):
        drawn = generator.integers(rows, size=(min(together, DRAWS - start), rows))
        ratios.append(differences[drawn].sum(1) / tokens[drawn].sum(1))
    outside = (1 - COVERED) / 2
    low, high = np.quantile(np.concatenate(ratios), [outside, 1 - outside])
    return float(low), float(high)
