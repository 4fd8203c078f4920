"""Base and adapters over the same rows: the frozen prefix run once for all, each adapter on and off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lorafit.adapter import adapted_names, attach, replaces_its_base
from lorafit.data import RowSet, rendered
from lorafit.evaluate.generate import Generator, Prompt, Sampling, row_prompts
from lorafit.evaluate.lm_eval import Tasks
from lorafit.evaluate.paired import RowScore, paired_score, summed
from lorafit.evaluate.score import Evaluator
from lorafit.evaluate.shared_base import EvaluatedBase
from lorafit.model import ModelMap, ModelSource
from lorafit.results import AdapterScore, Benchmark, EvalReport, Group, RowChange, Sample

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
    residency: str = "auto",
) -> tuple[EvalReport, dict[str, tuple[str, ...]]]:
    """(base and adapters over the same rows, and side by side; by adapter the names of what it adapts).

    `tick` is called with (rows done, rows in all). `residency` says whether the layers below all adapters are
    held, or streamed; `auto` streams where the base does not fit.
    Raises RequestError when an adapter does not fit the base, or layers that were to be streamed cannot be.
    """
    sets = {**({"": request.rows} if request.rows is not None else {}), **request.also}
    shared = EvaluatedBase(source, found, adapters, dtype, device, quantize)
    forward = shared.open(residency, bool(request.tasks or request.prompts))
    evaluators = shared.fill(
        [
            Evaluator(
                rows, forward, request.batch_size, tokenizer, found.vocab_size, device, name=f"set {number}"
            )
            for number, rows in enumerate(sets.values())
        ]
    )
    samples_of = request.samples if request.rows is not None and shared.streamed is None else 0
    prompts = [*(row_prompts(evaluators[0], samples_of) if samples_of else ()), *request.prompts]
    generator = Generator(
        tokenizer, evaluators[0].forward if evaluators else forward, device, found.max_positions, sampling
    )
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

    of_base = run_model(shared.model, shared.around(None, shared.model, evaluators), "base")
    of_adapters, adapted = [], {}
    for number, path in enumerate(adapters):
        peft_model = attach(shared.model, path)
        adapted[path] = adapted_names(peft_model)
        of_adapters.append(run_model(peft_model, shared.around(path, peft_model, evaluators), path))
        shared.model = peft_model.unload()
        if replaces_its_base(path) and number + 1 < len(adapters):
            shared.renew()
    scores = {
        name: (of_base.scores[n], [other.scores[n] for other in of_adapters]) for n, name in enumerate(sets)
    }
    samples = tuple(
        Sample(prompt.text, prompt.wanted, of_base.said[n], tuple(other.said[n] for other in of_adapters))
        for n, prompt in enumerate(prompts)
    )
    report = _report(request, adapters, evaluators, scores, samples)
    if shared.streamed is not None:
        layers = f"layers 0–{shared.streamed.cut - 1}" if shared.streamed.cut > 1 else "layer 0"
        report = replace(report, notes=(f"{layers} were streamed: no text was generated",))
    reached = [figure for each in (of_base, *of_adapters) for figure in each.reached]
    reached.sort(key=lambda figure: (figure.task, figure.metric))  # which keeps the models' order
    return replace(report, benchmarks=tuple(reached)), adapted


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
