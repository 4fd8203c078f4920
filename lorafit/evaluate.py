"""The same rows, the adapter off and on: paired, with its error bar, and a few completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lorafit.data import IGNORED, Batch, Row, collate, mask_tokens, plain
from lorafit.events import AdapterScore, Loss, Sample, Score
from lorafit.packing import in_order
from lorafit.step import Forward

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

    rows: tuple[Row, ...]
    forward: Forward
    batch_size: int
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    device: torch.device

    def batches(self) -> Iterator[tuple[list[int], Batch]]:
        """(row numbers, batch) in one fixed order, on the device."""
        generator = torch.Generator().manual_seed(MASK_SEED)
        lengths = [len(row.ids) for row in self.rows]
        for numbers in in_order(lengths, self.batch_size):
            rows = [self.rows[n] for n in numbers]
            batch = collate(rows, self.tokenizer.pad_token_id or 0, self.forward.task)
            if self.forward.task == "masked":
                batch = mask_tokens(batch, mask_id(self.tokenizer), self.vocab_size, generator)
            yield numbers, batch.to(self.device)

    @torch.no_grad()
    def scores(self, model: torch.nn.Module, tick: Callable[[int], None] = lambda n: None) -> list[RowScore]:
        """A score for each row, in the rows' order; `tick` hears of each batch's size."""
        training = model.training
        model.eval()
        found: dict[int, RowScore] = {}
        for numbers, batch in self.batches():
            logits_SV, labels_S = self.forward.logits(model, batch)
            loss_S = F.cross_entropy(logits_SV.float(), labels_S, reduction="none").double()
            right_S = logits_SV.argmax(-1) == labels_S
            labels = batch.labels[:, 1:] if self.forward.task == "causal" else batch.labels
            counts = (labels != IGNORED).sum(1).tolist()
            parts = zip(loss_S.split(counts), right_S.split(counts), strict=True)
            for number, tokens, (losses, rights) in zip(numbers, counts, parts, strict=True):
                found[number] = RowScore(float(losses.sum()), tokens, int(rights.sum()))
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
    from lorafit.errors import RequestError

    if tokenizer.mask_token_id is None:
        raise RequestError("a masked model needs a mask token, and this tokenizer has none")
    return int(tokenizer.mask_token_id)


def summed(scores: Sequence[RowScore]) -> Score:
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


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The base model, for as long as the block lasts."""
    with model.disable_adapter():
        yield


def samples(model: Any, evaluator: Evaluator, count: int) -> tuple[Sample, ...]:
    """Completions of the first rows, by base and adapter, greedy: what a person reads first."""
    model.eval()
    chosen = evaluator.rows[:count]
    if evaluator.forward.task == "masked":
        return _filled(model, evaluator, chosen)
    found = []
    for row in chosen:
        prompt, reference = _split(row, evaluator)
        with adapter_off(model):
            base = _complete(model, evaluator, prompt, len(reference))
        adapted = _complete(model, evaluator, prompt, len(reference))
        read = evaluator.tokenizer.decode
        found.append(
            Sample(
                read(prompt, skip_special_tokens=True),
                read(reference, skip_special_tokens=True),
                base,
                adapted,
            )
        )
    return tuple(found)


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
    base = model.get_base_model()
    ends = {tokenizer.eos_token_id, getattr(base.generation_config, "eos_token_id", None)}
    known = sorted(e for e in ends if isinstance(e, int))
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
def _filled(model: Any, evaluator: Evaluator, rows: Sequence[Row]) -> tuple[Sample, ...]:
    """A masked model's samples: the text with its masks, and what each model puts in them."""
    found = []
    tokenizer = evaluator.tokenizer
    for row in rows:
        # over this row alone, so that the same masks are hidden however many rows there are
        only = replace(evaluator, rows=(row,))
        _, batch = next(iter(only.batches()))
        guesses = []
        for off in (True, False):
            if off:
                with adapter_off(model):
                    logits_SV, labels_S = evaluator.forward.logits(model, batch)
            else:
                logits_SV, labels_S = evaluator.forward.logits(model, batch)
            guesses.append(" · ".join(plain(tokenizer.decode([t])) for t in logits_SV.argmax(-1).tolist()))
        wanted = " · ".join(plain(tokenizer.decode([t])) for t in labels_S.tolist())
        text = tokenizer.decode(batch.inputs["input_ids"][0].tolist())
        found.append(Sample(text, wanted, guesses[0], guesses[1]))
    return tuple(found)
