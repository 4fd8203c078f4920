"""Base and adapters over the same rows: the frozen prefix run once for all, each adapter on and off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafit.adapter import adapted_names, attach, changes_its_base, read_config, tensor_names
from lorafit.data import RowSet, rendered
from lorafit.evaluate.generate import Generator, Prompt, Sampling, row_prompts
from lorafit.evaluate.lm_eval import Tasks
from lorafit.evaluate.paired import RowScore, paired_score, summed
from lorafit.evaluate.score import Evaluator
from lorafit.forward import COMFORTABLE, Forward, MemoryStore, Prefix, cut_of, fill, refusal
from lorafit.model import ModelMap, ModelSource, load_model
from lorafit.results import AdapterScore, Benchmark, EvalReport, Group, RowChange, Sample
from lorafit.system import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What to evaluate on base and adapters.

    `rows` are scored, by `labels` (one a row) where `by` names them; `also` are other rows, by name.
    The prompts of the first `samples` rows and `prompts` are completed; of the rows that changed the most
    `extremes` are kept on either side; `tasks` are benchmarks.
    """

    rows: RowSet | None
    also: Mapping[str, RowSet] = field(default_factory=dict)
    by: str = ""
    labels: Sequence[str] = ()
    samples: int = 0
    prompts: Sequence[Prompt] = ()
    extremes: int = 3
    batch_size: int = 8
    tasks: Tasks | None = None


@dataclass(slots=True)
class _ModelResult:
    """One model: a score for each row of each set, what it says, what it reaches in benchmarks."""

    scores: list[list[RowScore]]
    said: list[str]
    reached: list[Benchmark]


@torch.no_grad()
def compare(
    request: EvalRequest,
    source: ModelSource,
    found: ModelMap,
    adapters: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    sampling: Sampling,
    device: torch.device,
    tick: Callable[[int, int], None] = lambda done, total: None,
    quantize: str = "none",
) -> tuple[EvalReport, dict[str, tuple[str, ...]]]:
    """(base and adapters over the same rows, and side by side; by adapter the names of what it adapts).

    `tick` is called with (rows done, rows in all).
    Raises RequestError when an adapter does not fit the base.
    """
    base: Any = load_model(source, dtype, device, quantize)
    forward = Forward.of(base, found.task)
    sets = {**({"": request.rows} if request.rows is not None else {}), **request.also}
    size = request.batch_size
    evaluators = [
        Evaluator(rows, forward, size, tokenizer, found.vocab_size, device, name=f"set {number}")
        for number, rows in enumerate(sets.values())
    ]
    prompts = [
        *(row_prompts(evaluators[0], request.samples) if request.rows is not None else ()),
        *request.prompts,
    ]
    generator = Generator(tokenizer, forward, device, found.max_positions, sampling)
    done, total = 0, sum(map(len, sets.values())) * (1 + len(adapters))

    def run_model(model: Any, around: Any, name: str) -> _ModelResult:
        def count(rows: int) -> None:
            nonlocal done
            done += rows
            tick(done, total)

        scores = [replace(each, prefix=around).scores(model, count) for each in evaluators]
        said, tasks = generator.completions(model, prompts), request.tasks
        reached = tasks.measured(model, name, tokenizer, found.task, str(device)) if tasks else []
        return _ModelResult(scores, said, reached)

    cuts = [_cut(path, found, base) for path in adapters]
    prefixes = _prefixes(cuts, found, base, evaluators)
    batches = (batch for each in evaluators for _, batch in each.batches())
    for _ in fill(list(prefixes.values()), batches, partial(forward.run, base), device) if prefixes else ():
        pass
    of_base = run_model(base, _exact(prefixes.get(max(cuts)), forward, base, evaluators), "base")
    of_adapters, adapted = [], {}
    for number, path in enumerate(adapters):
        peft_model = attach(base, path)
        adapted[path] = adapted_names(peft_model)
        prefix = _exact(prefixes.get(cuts[number]), forward, peft_model, evaluators)
        of_adapters.append(run_model(peft_model, prefix, path))
        base = peft_model.unload()
        if changes_its_base(read_config(path)) and number + 1 < len(adapters):
            base = load_model(source, dtype, device, quantize)
            prefixes = _moved(prefixes, base, found)
    scores = {
        name: (of_base.scores[n], [other.scores[n] for other in of_adapters]) for n, name in enumerate(sets)
    }
    samples = tuple(
        Sample(prompt.text, prompt.wanted, of_base.said[n], tuple(other.said[n] for other in of_adapters))
        for n, prompt in enumerate(prompts)
    )
    report = _report(request, adapters, evaluators, scores, samples)
    reached = [figure for each in (of_base, *of_adapters) for figure in each.reached]
    reached.sort(key=lambda figure: (figure.task, figure.metric))  # which keeps the models' order
    return replace(report, benchmarks=tuple(reached)), adapted


def _moved(prefixes: Mapping[int, Prefix], base: Any, found: ModelMap) -> dict[int, Prefix]:
    """The same states, for another copy of the base."""
    made = {}
    for cut, prefix in prefixes.items():
        made[cut] = Prefix.below(base, found.text_stacks[0].path, cut)
        made[cut].store, made[cut].forms = prefix.store, prefix.forms
    return made


def _exact(
    prefix: Prefix | None, forward: Forward, model: torch.nn.Module, evaluators: Sequence[Evaluator]
) -> Prefix:
    """That prefix where its replay gives the losses of a whole pass over the first rows, else one that runs
    every pass whole."""
    if prefix is None:
        return Prefix()
    _, first = next(evaluators[0].batches())
    reason, _ = prefix.differs(first, lambda batch: forward.scores(model, batch)[0])
    return Prefix() if reason else prefix


def _cut(path: str, found: ModelMap, base: torch.nn.Module) -> int:
    """The layer under which that adapter leaves the model as it is, and the replay may be exact; 0
    where there is none."""
    names = [name.removeprefix("base_model.model.") for name in tensor_names(Path(path).expanduser())]
    cut = cut_of(found, names)
    return 0 if refusal(found, cut, names, base, training=False) else next(iter(cut.values()))


def _prefixes(
    cuts: Sequence[int], found: ModelMap, base: Any, evaluators: Sequence[Evaluator]
) -> dict[int, Prefix]:
    """A prefix for each cut, so far as their states have room in memory, the highest cuts first."""
    dtype = next(base.parameters()).dtype
    size = found.hidden_size * dtype.itemsize * sum(each.processed for each in evaluators)
    room, made = COMFORTABLE * free_memory(), {}
    for cut in sorted(set(cuts) - {0}, reverse=True):
        if 0 < size <= room:
            room -= size
            made[cut] = Prefix.below(base, found.text_stacks[0].path, cut)
            made[cut].store = MemoryStore(size)
    return made


def _report(
    request: EvalRequest,
    adapters: Sequence[str],
    evaluators: Sequence[Evaluator],
    scores_of: Mapping[str, tuple[list[RowScore], list[list[RowScore]]]],
    samples: tuple[Sample, ...],
) -> EvalReport:
    """The report of what was scored: `scores_of` each set, those of the base and of each adapter."""
    also = tuple(_group(name, adapters, *scores_of[name]) for name in request.also)
    if request.rows is None:
        return EvalReport(0, 0, None, (), samples, tuple(adapters), also=also)
    scores, theirs = scores_of[""]
    whole = _group("", adapters, scores, theirs)
    best_and_worst = [_extremes(request, evaluators[0], scores, their) for their in theirs]
    named = sorted(set(request.labels))
    groups = []
    for name in named:
        chosen = [n for n, label in enumerate(request.labels) if label == name]
        groups.append(
            _group(name, adapters, [scores[n] for n in chosen], [[s[n] for n in chosen] for s in theirs])
        )
    return EvalReport(
        rows=whole.rows,
        tokens=whole.tokens,
        base=whole.base,
        adapters=tuple(
            replace(score, best=best, worst=worst)
            for score, (best, worst) in zip(whole.adapters, best_and_worst, strict=True)
        ),
        samples=samples,
        paths=tuple(adapters),
        exact_rows=sum(s.short for s in scores),
        by=request.by,
        ranked=_ranked(adapters, theirs) if len(adapters) > 1 else (),
        groups=tuple(groups),
        also=also,
    )


def _group(
    name: str, adapters: Sequence[str], base: Sequence[RowScore], others: Sequence[Sequence[RowScore]]
) -> Group:
    scored: list[AdapterScore] = [
        paired_score(path, base, own) for path, own in zip(adapters, others, strict=True)
    ]
    return Group(name, len(base), sum(s.tokens for s in base), summed(base), tuple(scored))


def _ranked(adapters: Sequence[str], scores: Sequence[Sequence[RowScore]]) -> tuple[AdapterScore, ...]:
    """The adapters from the lowest loss on, each in the place of an adapter and the first in that of the base."""
    order = sorted(zip(adapters, scores, strict=True), key=lambda each: summed(each[1]).loss)
    best = order[0][1]
    return tuple(paired_score(path, best, own) for path, own in order)


def _extremes(
    request: EvalRequest, evaluator: Evaluator, base: Sequence[RowScore], own: Sequence[RowScore]
) -> tuple[tuple[RowChange, ...], tuple[RowChange, ...]]:
    """The rows that gained the most a token, and those that gained the least; none is in both."""
    gains = [(o.loss_sum - b.loss_sum) / b.weight for o, b in zip(own, base, strict=True)]
    order = sorted(range(len(gains)), key=gains.__getitem__)
    many = min(request.extremes, len(order) // 2)

    def change(number: int) -> RowChange:
        row, weight = evaluator.rows[number], base[number].weight
        shown = rendered(row, evaluator.tokenizer, evaluator.forward.task)
        text = "".join(piece for piece, _ in shown.pieces)
        return RowChange(
            shown.where,
            text,
            base[number].tokens,
            base[number].loss_sum / weight,
            own[number].loss_sum / weight,
        )

    return tuple(map(change, order[:many])), tuple(map(change, order[::-1][:many]))
