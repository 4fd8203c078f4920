"""The candidates trained one after another on one base, each into a run folder of its own; a stream of events."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.adapter import attach
from lorafit.compare.ahead import Ahead
from lorafit.compare.candidates import Candidate
from lorafit.compare.folder import CompareFolder
from lorafit.compare.halving import halved, shares
from lorafit.compare.results import DROPPED, FAILED, FINISHED, PAUSED, Began, Cut, Ended, Outcome, Scores
from lorafit.compare.shared import SharedBase
from lorafit.data import Rows, RowSet
from lorafit.errors import Interrupted, RequestError, RunError
from lorafit.estimate import predicted
from lorafit.evaluate import Evaluator, summed
from lorafit.events import Event, Stepped, TrainReport
from lorafit.forward import Forward, Prefix, base_of, refusal
from lorafit.report import read_back
from lorafit.train import RunFolder, peak_memory, recorded, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Happening = Event | Began | Ended | Cut

ENOUGH = 1  # the signal by which a candidate ends a round of halving


@dataclass(slots=True)
class Comparison:
    """Candidates on one base, over the same rows. `also` are texts that they should not change, by file."""

    ahead: Ahead
    shared: SharedBase
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    folder: CompareFolder
    also: Mapping[str, RowSet]
    halving: bool = False
    stop: Callable[[], int] = lambda: 0

    def run(self) -> Iterator[Happening]:
        """Train what is missing. Raises Interrupted, with what goes on, when `stop` asks for an end; RunError when
        the folder cannot be written."""
        base = self.folder.base() or self._base_scores()
        alive = list(self.ahead.candidates)
        every = shares() if self.halving else (1.0,)
        for share in every:
            for number, one in enumerate(alive, 1):
                if self._is_there(one, share):
                    continue
                yield Began(one.name, number, len(alive), self._work(one).is_dir())
                yield from self._train(one, share)
                outcome = self.folder.outcome(one.name)
                assert outcome is not None
                loss = summed(outcome.scores.rows).loss if outcome.scores else None
                yield Ended(outcome, loss, summed(base.rows).loss)
            if share < 1:
                cut = self._halve(alive, share)
                alive = [one for one in alive if one.choice in cut.kept]
                yield cut

    def outcomes(self) -> dict[str, Outcome]:
        """What became of each candidate so far, in their order."""
        found = ((one.name, self.folder.outcome(one.name)) for one in self.ahead.candidates)
        return {name: outcome for name, outcome in found if outcome is not None}

    def _is_there(self, one: Candidate, share: float) -> bool:
        """Whether nothing is left to do of a candidate up to that share of its steps."""
        outcome = self.folder.outcome(one.name)
        if outcome is None:
            return False
        done = outcome.status in (FINISHED, FAILED, DROPPED)
        return done or outcome.step >= _until(one, self.ahead, share)

    def _work(self, one: Candidate) -> Path:
        return RunFolder(self.folder.run(one.name)).work

    def _train(self, one: Candidate, share: float) -> Iterator[Event]:
        """Train a candidate to that share of its steps, score it, and keep what became of it."""
        target = self.folder.run(one.name)
        if target.is_dir():  # finished, and stopped before its scores were kept
            self.folder.keep(self._rescored(one))
            return
        folder = RunFolder(target)
        resumes = folder.work.is_dir()
        config = replace(one.config, output=str(target), resume=resumes)
        until, steps = _until(one, self.ahead, share), self.ahead.costs[one.name].steps or 0
        at = 0

        def enough() -> int:
            return self.stop() or (ENOUGH if share < 1 and at >= until else 0)

        cost = self.ahead.costs[one.name]
        try:
            folder.open(False, resumes)
            with self.shared.carrying(
                config, one.plan, self.rows, self.tokenizer, folder, enough, predicted(cost, one.plan)
            ) as job:
                report: TrainReport | None = None
                seconds = tokens = 0.0
                try:
                    with closing(recorded(job, run(job))) as events:  # type: ignore[type-var]
                        for event in events:
                            if isinstance(event, Stepped):
                                at, seconds, tokens = (
                                    event.step,
                                    seconds + event.seconds,
                                    tokens + event.tokens,
                                )
                            report = event if isinstance(event, TrainReport) else report
                            yield event
                except Interrupted as error:
                    if self.stop():
                        raise self._interrupted(error) from None
                scores = self._scores(job.model, one, job.config)
                device = job.device
                outcome = Outcome(
                    one.name, one.choice, PAUSED, "", at, steps, seconds, tokens / max(1e-9, seconds)
                )
                outcome = replace(
                    outcome,
                    scores=scores,
                    peak=peak_memory(device),
                    growth=peak_memory(device) - job.memory_before,
                )
                if report is not None:
                    outcome = _of_report(outcome, report)
        except (RunError, RequestError) as error:
            if isinstance(error.__cause__, OSError):  # the disk: no candidate could be written
                raise
            outcome = Outcome(one.name, one.choice, FAILED, error.message, at, steps)
        finally:
            folder.abandon()
        self.folder.keep(outcome)

    def _interrupted(self, error: Interrupted) -> Interrupted:
        place = shlex.quote(str(self.folder.target))
        return Interrupted(
            error.message, f"lorafit compare --resume {place} goes on from there", error.exit_code - 128
        )

    def _halve(self, alive: Sequence[Candidate], share: float) -> Cut:
        """Which choices go on, with all their seeds: as it was decided before, where a comparison goes on."""
        found = next((cut for cut in self.folder.cuts() if cut.share == share), None)
        if found is None:
            outcomes = {
                name: outcome for name, outcome in self.outcomes().items() if outcome.status == PAUSED
            }
            here = [outcomes[one.name] for one in alive if one.name in outcomes]
            kept = halved(here)
            found = Cut(share, tuple(sorted(kept)), tuple(sorted({one.choice for one in here} - kept)))
            self.folder.keep_cut(found)
        for one in alive:
            outcome = self.folder.outcome(one.name)
            if one.choice in found.dropped and outcome is not None and outcome.status == PAUSED:
                reason = f"dropped after step {outcome.step} of {outcome.steps}"
                self.folder.keep(replace(outcome, status=DROPPED, reason=reason))
        return found

    def _evaluators(
        self, config: Any, forward: Forward, prefix: Prefix | None
    ) -> Iterator[tuple[str, Evaluator]]:
        sets = {"": self.rows.held_out, **self.also}
        base = self.shared.base
        for number, (name, rows) in enumerate(sets.items()):
            made = Evaluator(
                rows,
                forward,
                config.batch_size or 1,
                self.tokenizer,
                base.found.vocab_size,
                base.device,
                name="held-out" if not name else f"also {number}",
            )
            yield name, replace(made, prefix=prefix) if prefix is not None else made

    def _scores(self, model: Any, one: Candidate | None, config: Any) -> Scores:
        """A score for each row under a model; of a candidate's, with the states below its cut where they are kept."""
        forward = Forward.of(model, self.shared.base.found.task, config.head_chunk or 0)
        prefix = self._prefix(model, one) if one is not None else None
        found = {name: tuple(each.scores(model)) for name, each in self._evaluators(config, forward, prefix)}
        return Scores(found.pop(""), found)

    def _prefix(self, model: Any, one: Candidate) -> Prefix | None:
        """The states that were proved and filled in training; None where training had none."""
        base, found = base_of(model), self.shared.base.found
        if len(one.plan.cut) != 1 or one.config.prefix_cache == "off":
            return None
        ((stack, cut),) = one.plan.cut.items()
        states = self.shared.states.get((stack, cut))
        names = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
        if states is None or refusal(found, one.plan.cut, names, base, training=True):
            return None
        prefix = Prefix.below(base, stack, cut)
        prefix.store, prefix.forms = states
        return prefix

    def _base_scores(self) -> Scores:
        scores = self._scores(self.shared.base.model, None, self.ahead.candidates[0].config)
        self.folder.keep_base(scores)
        return scores

    def _rescored(self, one: Candidate) -> Outcome:
        """The outcome of a finished run, scored again from its folder."""
        target = self.folder.run(one.name)
        report = read_back(target).report
        base = self.shared.base
        model = attach(base.model, target)
        try:
            scores = self._scores(model, None, one.config)
        finally:
            self.shared.drop()
        blank = Outcome(
            one.name, one.choice, FINISHED, "", 0, self.ahead.costs[one.name].steps or 0, scores=scores
        )
        return replace(
            blank,
            step=int(report["steps"]),
            seconds=float(report["seconds"]),
            tokens_per_second=float(report["tokens_per_second"]),
            peak=int(report["peak_memory_bytes"]),
            growth=int(report["memory_growth_bytes"]),
        )


def _until(one: Candidate, ahead: Ahead, share: float) -> int:
    """The step that ends a round of halving."""
    return max(1, round((ahead.costs[one.name].steps or 1) * share))


def _of_report(outcome: Outcome, report: TrainReport) -> Outcome:
    return replace(
        outcome,
        status=FINISHED,
        step=report.steps,
        seconds=report.seconds,
        tokens_per_second=report.tokens_per_second,
        peak=report.peak_memory_bytes,
        growth=report.memory_growth_bytes,
    )
