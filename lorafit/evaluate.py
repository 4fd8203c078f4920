"""The same rows, the adapter off and on: paired, with its error bar, and a few completions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from lorafit.batch import Batch, collate, mask_tokens
from lorafit.errors import RequestError
from lorafit.events import AdapterScore, Loss, Score
from lorafit.packing import Part, in_order
from lorafit.prefix import Prefix
from lorafit.rows import IGNORED, Row, RowSet
from lorafit.step import Forward, base_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK_SEED = 20181011  # of the masks that evaluation hides: the same ones for every model


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row: its summed loss in nats, its supervised tokens, how many were guessed right."""

    loss_sum: float
    tokens: int
    correct: int


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Rows and how to put them to a model: the same batches, with the same masks, each time."""

    rows: RowSet
    forward: Forward
    batch_size: int
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    device: torch.device
    prefix: Prefix = field(default_factory=Prefix)

    @property
    def parts(self) -> list[Part]:
        """The rows' numbers as they are run together, in one fixed order."""
        return in_order(self.rows.lengths.tolist(), self.batch_size)

    @property
    def keys(self) -> list[str]:
        """The keys of its micro-batches."""
        return [f"held-out {number}" for number in range(len(self.parts))]

    @property
    def processed(self) -> int:
        """Tokens that a pass over the rows runs, padding with them."""
        lengths = self.rows.lengths
        return int(sum(len(part) * lengths[list(part)].max() for part in self.parts))

    def batches(self) -> Iterator[tuple[Part, Batch]]:
        """(row numbers, batch) in one fixed order, on the device."""
        task = self.forward.task
        for numbers, key in zip(self.parts, self.keys, strict=True):
            rows = [self._masked(n) if task == "masked" else self.rows[n] for n in numbers]
            yield numbers, collate(rows, self.tokenizer.pad_token_id or 0, task, key).to(self.device)

    def _masked(self, number: int) -> Row:
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
                found[number] = RowScore(float(loss.sum()), tokens, int(right.sum()))
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


def summed(scores: Sequence[RowScore]) -> Score:
    """The rows together: loss and perplexity per supervised token, accuracy."""
    tokens = sum(s.tokens for s in scores)
    loss = Loss(sum(s.loss_sum for s in scores) / tokens, tokens)
    return Score(loss.loss, loss.perplexity, sum(s.correct for s in scores) / tokens)


def paired(path: str, base: Sequence[RowScore], adapter: Sequence[RowScore]) -> AdapterScore:
    """An adapter against the base over the same rows.

    With d_i the difference of row i's summed loss and n_i its tokens, delta = sum d / sum n, a ratio;
    its standard error is sqrt(R/(R-1) * sum (d_i - delta*n_i)^2) / sum n over R rows (Cochran,
    Sampling Techniques, 3rd ed., sec. 6.4). 0 where there is one row.
    """
    rows = len(base)
    tokens = sum(s.tokens for s in base)
    differences = [a.loss_sum - b.loss_sum for a, b in zip(adapter, base, strict=True)]
    delta = sum(differences) / tokens
    spread = sum((d - delta * s.tokens) ** 2 for d, s in zip(differences, base, strict=True))
    stderr = sqrt(rows / (rows - 1) * spread) / tokens if rows > 1 else 0.0
    score = summed(adapter)
    return AdapterScore(path, score.loss, score.perplexity, score.accuracy, delta, stderr)


def prompts(evaluator: Evaluator, count: int) -> list[tuple[str, str]]:
    """(prompt, reference) of the first rows as text: what a person reads first."""
    read = evaluator.tokenizer.decode
    found = []
    for number, row in enumerate(evaluator.rows[:count]):
        if evaluator.forward.task == "masked":
            row = evaluator._masked(number)
            wanted = [plain(read([label])) for label in row.labels if label != IGNORED]
            found.append((read(list(row.ids)), " · ".join(wanted)))
        else:
            prompt, reference = _split(row, evaluator)
            found.append((read(prompt, skip_special_tokens=True), read(reference, skip_special_tokens=True)))
    return found


def completions(model: Any, evaluator: Evaluator, count: int) -> list[str]:
    """What a model says to the first rows, greedily; a masked model fills its masks."""
    model.eval()
    if evaluator.forward.task == "masked":
        return _filled(model, evaluator, count)
    found = []
    for row in evaluator.rows[:count]:
        prompt, reference = _split(row, evaluator)
        found.append(_complete(model, evaluator, prompt, len(reference)))
    return found


def _split(row: Row, evaluator: Evaluator) -> tuple[list[int], list[int]]:
    """(prompt, reference) of a row; a text without a prompt is cut after its first quarter."""
    if evaluator.forward.task == "seq2seq":
        return list(row.ids), [label for label in row.labels if label != IGNORED]
    at = row.prompt
    if at < 2:
        at = max(2, len(row.ids) // 4)
        return list(row.ids[:at]), list(row.ids[at : at + 64])
    stop = at
    while stop < len(row.labels) and row.labels[stop] != IGNORED:
        stop += 1
    return list(row.ids[:at]), list(row.ids[at:stop])


@torch.no_grad()
def _complete(model: Any, evaluator: Evaluator, prompt: list[int], length: int) -> str:
    from transformers import GenerationConfig

    tokenizer = evaluator.tokenizer
    base = base_of(model)
    stated = getattr(base.generation_config, "eos_token_id", None)  # one, several, or none
    ends = [tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
    known = sorted({end for end in ends if isinstance(end, int)})
    start = getattr(base.generation_config, "decoder_start_token_id", None)
    settings = GenerationConfig(
        max_new_tokens=min(256, length + 24),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=known or None,
        decoder_start_token_id=start,
        bos_token_id=tokenizer.bos_token_id,
    )
    ids = torch.tensor([prompt], device=evaluator.device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0]
    new = out if evaluator.forward.task == "seq2seq" else out[len(prompt) :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


@torch.no_grad()
def _filled(model: Any, evaluator: Evaluator, count: int) -> list[str]:
    """What a masked model puts in the masks of the first rows."""
    found = []
    for number in range(min(count, len(evaluator.rows))):
        batch = collate([evaluator._masked(number)], evaluator.tokenizer.pad_token_id or 0, "masked")
        logits_NV = evaluator.forward.logits(model, batch.to(evaluator.device))
        words = [plain(evaluator.tokenizer.decode([t])) for t in logits_NV.argmax(-1).tolist()]
        found.append(" · ".join(words))
    return found


def plain(text: str) -> str:
    """A text on one line, for a table."""
    return re.sub(r"\s+", " ", text).strip()
