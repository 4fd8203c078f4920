"""Rows put to a model, the same ones in the same batches each time; what two models make of them, paired."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from lorafit.batch import Batch, collate, mask_tokens
from lorafit.errors import RequestError
from lorafit.events import AdapterScore, Loss, Score
from lorafit.packing import Part, in_order
from lorafit.prefix import Prefix
from lorafit.rows import IGNORED, Row, RowSet
from lorafit.step import Forward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK_SEED = 20181011  # of the masks that evaluation hides: the same ones for every model
SHORT = 64  # tokens of an answer up to which a row counts for the exact match
DRAWS, COVERED = 2000, 0.95  # resamplings of the rows behind an interval, and what it covers


class Around(Protocol):
    """What is done around a forward pass: the replay of the frozen prefix, or nothing."""

    def around(self, batch: Batch) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row: its summed loss in nats, its supervised tokens, how many of them were the most likely
    one; `short` where it is a prompt with one answer of few tokens."""

    loss_sum: float
    tokens: int
    correct: int
    short: bool = False

    @property
    def exact(self) -> bool:
        """Whether decoding greedily says the answer token for token: where each token of it is the
        most likely one after those before it, and only there."""
        return self.correct == self.tokens


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Rows and how to put them to a model: the same batches, with the same masks, each time."""

    rows: RowSet
    forward: Forward
    batch_size: int
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    device: torch.device
    prefix: Around = field(default_factory=Prefix)
    name: str = "held-out"  # in the keys of its micro-batches

    @property
    def parts(self) -> list[Part]:
        """The rows' numbers as they are run together, in one fixed order."""
        return in_order(self.rows.lengths.tolist(), self.batch_size)

    @property
    def keys(self) -> list[str]:
        """The keys of its micro-batches."""
        return [f"{self.name} {number}" for number in range(len(self.parts))]

    @property
    def processed(self) -> int:
        """Tokens that a pass over the rows runs, padding with them."""
        lengths = self.rows.lengths
        return int(sum(len(part) * lengths[list(part)].max() for part in self.parts))

    def batches(self) -> Iterator[tuple[Part, Batch]]:
        """(row numbers, batch) in one fixed order, on the device."""
        task = self.forward.task
        for numbers, key in zip(self.parts, self.keys, strict=True):
            rows = [self.masked(n) if task == "masked" else self.rows[n] for n in numbers]
            yield numbers, collate(rows, self.tokenizer.pad_token_id or 0, task, key).to(self.device)

    def masked(self, number: int) -> Row:
        """A row with its masks, which depend on nothing but its number."""
        generator = torch.Generator().manual_seed(MASK_SEED + number)
        alone = collate([self.rows[number]], self.tokenizer.pad_token_id or 0, "masked")
        alone = mask_tokens(alone, mask_id(self.tokenizer), self.vocab_size, generator)
        ids, labels = alone.inputs["input_ids"][0].tolist(), alone.labels[0].tolist()
        return replace(self.rows[number], ids=tuple(ids), labels=tuple(labels))

    @torch.no_grad()
    def scores(self, model: torch.nn.Module, tick: Callable[[int], None] = lambda n: None) -> list[RowScore]:
        """A score for each row, in the rows' order; `tick` hears of each batch's size."""
        training = model.training
        model.eval()
        found: dict[int, RowScore] = {}
        for numbers, batch in self.batches():
            with self.prefix.around(batch):
                loss_N, right_N = self.forward.scores(model, batch)
            losses, rights = loss_N.double().split(batch.counts), right_N.split(batch.counts)
            for number, tokens, loss, right in zip(numbers, batch.counts, losses, rights, strict=True):
                short = self.forward.task != "masked" and short_answer(self.rows[number], self.forward.task)
                found[number] = RowScore(float(loss.sum()), tokens, int(right.sum()), short)
            tick(len(numbers))
        model.train(training)
        return [found[n] for n in range(len(self.rows))]

    def loss(self, model: torch.nn.Module) -> Loss:
        """The mean loss per supervised token."""
        scores = self.scores(model)
        tokens = sum(s.tokens for s in scores)
        return Loss(sum(s.loss_sum for s in scores) / tokens, tokens)


def mask_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The mask token's id. Raises RequestError when the tokenizer has none."""
    if tokenizer.mask_token_id is None:
        raise RequestError("a masked model needs a mask token, and this tokenizer has none")
    return int(tokenizer.mask_token_id)


def short_answer(row: Row, task: str) -> bool:
    """Whether a row is a prompt with one answer of few tokens, which ends it."""
    learned = [at for at, label in enumerate(row.labels) if label != IGNORED]
    if not learned or len(learned) > SHORT or learned[-1] - learned[0] >= len(learned):
        return False
    return task == "seq2seq" or learned[0] > 1


def summed(scores: Sequence[RowScore]) -> Score:
    """The rows together: loss and perplexity per supervised token, accuracy, exact match."""
    tokens = sum(s.tokens for s in scores)
    loss = Loss(sum(s.loss_sum for s in scores) / tokens, tokens)
    short = [s.exact for s in scores if s.short]
    accuracy = sum(s.correct for s in scores) / tokens
    return Score(loss.loss, loss.perplexity, accuracy, sum(short) / len(short) if short else None)


def paired(path: str, base: Sequence[RowScore], adapter: Sequence[RowScore]) -> AdapterScore:
    """An adapter against the base over the same rows.

    With d_i the difference of row i's summed loss and n_i its tokens, delta = sum d / sum n, a ratio;
    its standard error is sqrt(R/(R-1) * sum (d_i - delta*n_i)^2) / sum n over R rows (Cochran,
    Sampling Techniques, 3rd ed., sec. 6.4). 0 where there is one row. The interval is the percentile
    bootstrap's (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13): rows are drawn with
    their pair of losses, so what makes a row hard for both does not widen it.
    """
    rows = len(base)
    tokens = np.array([s.tokens for s in base], dtype=np.float64)
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
