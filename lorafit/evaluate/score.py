"""Rows put to a model: the same batches, with the same masks, each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from lorafit.data import IGNORED, Batch, MicroBatch, Row, RowSet, collate_rows, in_order, mask_row
from lorafit.distributed import ALONE, World
from lorafit.errors import RequestError
from lorafit.evaluate.paired import RowScore
from lorafit.events import Loss
from lorafit.forward import Forward, Prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MASK_SEED = 20181011  # of the masks that evaluation hides: the same ones for every model

SHORT = 64  # tokens of an answer up to which a row counts for the exact match


class Around(Protocol):
    """What is done around a forward pass: the replay of the frozen prefix, or nothing."""

    def around(self, batch: Batch) -> AbstractContextManager[None]: ...


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
    world: World = ALONE
    at_once: bool = False  # all processes run as many batches: one without another runs the first along

    @property
    def parts(self) -> list[MicroBatch]:
        """The rows' numbers as they are run together, in one fixed order."""
        return in_order(self.rows.lengths.tolist(), self.batch_size)

    @property
    def own(self) -> list[int]:
        """The numbers of the parts that are this process's share."""
        return list(self.world.share(range(len(self.parts))))

    @property
    def run(self) -> list[int]:
        """The numbers of the parts that this process runs: its share, and where all run `at_once` the first once
        more if others have more."""
        more = -(-len(self.parts) // self.world.size) - len(self.own) if self.at_once else 0
        return self.own + [0] * more

    @property
    def keys(self) -> list[str]:
        """The keys of its micro-batches that this process runs."""
        return [f"{self.name} {number}" for number in self.run]

    @property
    def processed(self) -> int:
        """Tokens that this process's pass over the rows runs, padding with them."""
        lengths, parts = self.rows.lengths, self.parts
        return int(sum(len(parts[n]) * lengths[list(parts[n])].max() for n in self.run))

    @property
    def tokens(self) -> int:
        """Tokens of the rows that this process runs."""
        parts = self.parts
        return int(sum(self.rows.lengths[list(parts[n])].sum() for n in self.run))

    def batches(self) -> Iterator[tuple[MicroBatch, Batch]]:
        """(row numbers, batch) that this process runs, its share first, in one fixed order, on the device."""
        task, parts = self.forward.task, self.parts
        for numbers, key in zip((parts[n] for n in self.run), self.keys, strict=True):
            rows = [self.masked(n) if task == "masked" else self.rows[n] for n in numbers]
            yield numbers, collate_rows(rows, self.tokenizer.pad_token_id or 0, task, key).to(self.device)

    def masked(self, number: int) -> Row:
        """A row with its masks, which depend on nothing but its number."""
        pad = self.tokenizer.pad_token_id or 0
        return mask_row(self.rows[number], pad, mask_id(self.tokenizer), self.vocab_size, MASK_SEED + number)

    @torch.no_grad()
    def scores(self, model: torch.nn.Module, tick: Callable[[int], None] = lambda n: None) -> list[RowScore]:
        """A score for each row of this process's share, in the rows' order; `tick` is called with each batch's
        size."""
        training = model.training
        model.eval()
        found: dict[int, RowScore] = {}
        own = {n for part in self.own for n in self.parts[part]}
        for numbers, batch in self.batches():
            with self.prefix.around(batch):
                loss_N, right_N = self.forward.scores(model, batch)
            loss_N = loss_N.double() if batch.weights is None else loss_N.double() * batch.weights
            found_2N = torch.stack([loss_N, right_N.double()]).cpu()  # the one wait for the device in a batch
            losses, rights = (part.split(batch.counts) for part in found_2N)
            weights = batch.row_weights or (None,) * len(batch.counts)
            for number, tokens, loss, right, weight in zip(
                numbers, batch.counts, losses, rights, weights, strict=True
            ):
                short = self.forward.task != "masked" and short_answer(self.rows[number], self.forward.task)
                found[number] = RowScore(float(loss.sum()), tokens, int(right.sum()), short, weight)
            tick(len(numbers))
        model.train(training)
        return [found[n] for n in sorted(own)]

    def loss(self, model: torch.nn.Module) -> Loss:
        """The mean loss per supervised token, over the rows of all processes."""
        scores = self.scores(model)
        sums = torch.tensor(
            [sum(s.loss_sum for s in scores), sum(s.weight for s in scores), sum(s.tokens for s in scores)],
            dtype=torch.float64,
        )
        self.world.sums([sums])
        total, weight, tokens = sums.tolist()
        return Loss(total / weight, int(tokens))


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
