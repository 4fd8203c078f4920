"""The candidates trained one after another on one base, each into a run folder of its own; a stream of events."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.adapter import attach
from lorafit.compare.ahead import Ahead
from lorafit.compare.candidates import Candidate
from lorafit.compare.folder import CompareFolder
from lorafit.compare.halving import halved, shares
from lorafit.compare.hint import Hint, hint_of
from lorafit.compare.results import DROPPED, FAILED, FINISHED, PAUSED, Began, Cut, Ended, Outcome, Scores
from lorafit.compare.shared import SharedBase
from lorafit.compare.states import Passing, fill_all, needed
from lorafit.compare.workers import Stop, spread
from lorafit.data import Rows, RowSet
from lorafit.errors import Interrupted, RequestError, RunError
from lorafit.estimate import predicted
from lorafit.evaluate import Evaluator, summed
from lorafit.events import Event, PrefixCache, Stepped, TrainReport
from lorafit.forward import Forward, Prefix
from lorafit.report import read_back
from lorafit.settings import RunConfig
from lorafit.train import Job, RunFolder, composed, peak_memory, recorded, run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Happening = Event | Began | Ended | Cut | Hint

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
    hints: bool = False
    workers: int = 1
    stop: Callable[[], int] = lambda: 0
    again: set[str] = field(default_factory=set)  # candidates that failed before, and are tried again

    def run(self) -> Iterator[Happening]:
        """Train what is missing. Raises Interrupted, with what goes on, when `stop` asks for an end; RunError when
        the folder cannot be written."""
        failed = {outcome for outcome in self.outcomes().values() if outcome.status == FAILED}
        cuts = self.folder.cuts()
        self.again = {one.name for one in failed if all(one.choice in cut.kept for cut in cuts)}
        base, streams = self.folder.base(), self.ahead.candidates[0].streams
        if base is None and not streams:
            base = self._base_scores()
        if self.hints and not streams:
            yield self._hint()
        missing = not all(self._is_there(one, 1.0) for one in self.ahead.candidates)
        if missing or (streams and (base is None or self.hints)):
            yield from self._fill()
        if base is None:  # scored on the states of the layers that are not held
            base = self._base_scores()
        if self.hints and streams:
            yield self._hint()
        alive = list(self.ahead.candidates)
        every = shares() if self.halving else (1.0,)
        for share in every:
            left = [one for one in alive if not self._is_there(one, share)]
            self.again -= {one.name for one in left}
            if self.workers > 1 and len(left) > 1:
                yield from self._spread(left, alive, share, summed(base.rows).loss)
            else:
                for one in left:
                    yield from self._one(one, alive, share, summed(base.rows).loss)
            if share < 1:
                cut = self._halve(alive, share)
                alive = [one for one in alive if one.choice in cut.kept]
                yield cut

    def _one(
        self, one: Candidate, alive: Sequence[Candidate], share: float, base_loss: float
    ) -> Iterator[Happening]:
        """One candidate, to that share of its steps."""
        if number := self.stop():
            raise self._interrupted(Interrupted("interrupted between two candidates", "", number))
        yield Began(one.name, alive.index(one) + 1, len(alive), self._work(one).is_dir())
        yield from self._train(one, share)
        outcome = self.folder.outcome(one.name)
        assert outcome is not None
        loss = summed(outcome.scores.rows).loss if outcome.scores else None
        yield Ended(outcome, loss, base_loss)

    def _spread(
        self, left: Sequence[Candidate], alive: Sequence[Candidate], share: float, base_loss: float
    ) -> Iterator[Happening]:
        """Several candidates at once, those first that take longest."""
        self.shared.base  # noqa: B018  # loaded before the processes part

        def task(one: Candidate) -> Callable[[Stop], Iterator[Happening]]:
            def run_one(stop: Stop) -> Iterator[Happening]:
                self.stop = stop
                for event in self._one(one, alive, share, base_loss):
                    if isinstance(event, (Began, Ended, Stepped)):
                        yield event

            return run_one

        order = sorted(left, key=lambda one: -self.ahead.seconds[one.name])
        yield from spread([task(one) for one in order], self.workers, self.stop)
        if (number := self.stop()) and not all(self._is_there(one, share) for one in left):
            raise self._interrupted(Interrupted("interrupted between two candidates", "", number))

    def outcomes(self) -> dict[str, Outcome]:
        """What became of each candidate so far, in their order."""
        found = ((one.name, self.folder.outcome(one.name)) for one in self.ahead.candidates)
        return {name: outcome for name, outcome in found if outcome is not None}

    def _is_there(self, one: Candidate, share: float) -> bool:
        """Whether nothing is left to do of a candidate up to that share of its steps."""
        outcome = self.folder.outcome(one.name)
        if outcome is None or one.name in self.again:
            return False
        done = outcome.status in (FINISHED, FAILED, DROPPED)
        return done or outcome.step >= _until(one, self.ahead, share)

    def _work(self, one: Candidate) -> Path:
        return RunFolder(self.folder.run(one.name)).work

    def _train(self, one: Candidate, share: float) -> Iterator[Event]:
        """Train a candidate to that share of its steps, score it, and keep what became of it."""
        target, cost = self.folder.run(one.name), self.ahead.costs[one.name]
        if target.is_dir():  # finished, and stopped before its scores were kept
            self.folder.keep(self._rescored(one))
            return
        folder, seen = RunFolder(target), _Seen(_until(one, self.ahead, share))
        resumes = folder.work.is_dir()
        config = replace(one.config, output=str(target), resume=resumes)
        outcome = Outcome(one.name, one.choice, FAILED, steps=cost.steps or 0)

        def stop() -> int:
            return self.stop() or (ENOUGH if share < 1 and seen.step >= seen.until else 0)

        try:
            folder.open(False, resumes)
            with self.shared.carrying(
                config, one.plan, self.rows, self.tokenizer, folder, stop, predicted(cost, one.plan)
            ) as job:
                try:
                    with closing(recorded(job, run(job))) as events:  # type: ignore[type-var]
                        for event in events:
                            seen.on(event)
                            yield event
                except Interrupted as error:
                    if self.stop():
                        raise self._interrupted(error) from None
                prefix = self._prefix(job.model, one.plan.cut) if seen.replays else None
                before = self.folder.outcome(one.name)  # of an earlier round, or session
                seconds = before.seconds if before is not None and before.status == PAUSED else 0.0
                outcome = seen.outcome(outcome, self._scores(job.model, job.config, prefix), job, seconds)
        except (RunError, RequestError) as error:
            if isinstance(error.__cause__, OSError):  # the disk: no candidate could be written
                raise
            outcome = replace(outcome, reason=error.message, step=seen.step)
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

    def _evaluators(self, config: RunConfig, forward: Forward) -> dict[str, Evaluator]:
        """The held-out rows, under an empty name, and the texts that should not change, by file."""
        base, found = self.shared.base, {}
        for number, (name, rows) in enumerate({"": self.rows.held_out, **self.also}.items()):
            found[name] = Evaluator(
                rows,
                forward,
                config.batch_size or 1,
                self.tokenizer,
                base.found.vocab_size,
                base.device,
                name=f"also {number}" if name else "held-out",
            )
        return found

    def _forward(self, model: Any, config: RunConfig) -> Forward:
        task = self.shared.base.found.task
        return self.shared.forward or Forward.of(model, task, config.head_chunk or 0)

    def _prefix(self, model: torch.nn.Module, cut: Mapping[str, int]) -> Prefix | None:
        """The replay of what the candidates share below that cut; None where they share nothing."""
        return self.shared.replaying(model, *next(iter(cut.items()))) if len(cut) == 1 else None

    def _numbers(self) -> list[int]:
        """The numbers of the batches that some candidate trains on."""
        ahead, task = self.ahead.candidates, self.shared.base.found.task
        steps = {name: cost.steps or 1 for name, cost in self.ahead.costs.items()}
        return needed(ahead, steps, len(composed(self.rows, ahead[0].config, task)))

    def _hint(self) -> Hint:
        return hint_of(self.shared, self.ahead.candidates, self.rows, self.tokenizer, self._numbers())

    def _fill(self) -> Iterator[Event]:
        """The states below all cuts, in one pass."""
        ahead, base = self.ahead.candidates, self.shared.base
        config, task = ahead[0].config, base.found.task
        make = Forward.of if base.streamed is None else Forward.plain
        forward = make(base.model, task, config.head_chunk or 0)
        evaluators = list(self._evaluators(config, forward).values())
        passing = Passing(self.rows, config, task, self.tokenizer, self._numbers(), evaluators)
        for event in fill_all(self.shared, ahead, passing, forward):
            yield event
            if number := self.stop():
                raise self._interrupted(Interrupted("interrupted before the first candidate", "", number))

    def _scores(self, model: Any, config: RunConfig, prefix: Prefix | None = None) -> Scores:
        """A score for each row under a model, with the states below its cut where those are given."""
        found = {}
        for name, each in self._evaluators(config, self._forward(model, config)).items():
            each = replace(each, prefix=prefix) if prefix is not None else each
            found[name] = tuple(each.scores(model))
        return Scores(found.pop(""), found)

    def _base_scores(self) -> Scores:
        base, prefix = self.shared.base, None
        if base.streamed is not None:
            prefix = self.shared.replaying(base.model, base.streamed.stack, base.streamed.cut)
        scores = self._scores(base.model, self.ahead.candidates[0].config, prefix)
        self.folder.keep_base(scores)
        return scores

    def _rescored(self, one: Candidate) -> Outcome:
        """The outcome of a finished run, scored again from its folder."""
        target = self.folder.run(one.name)
        report = read_back(target).report
        base = self.shared.base
        model = attach(base.model, target)
        try:
            prefix = self._prefix(model, one.plan.cut) if base.streamed is not None else None
            scores = self._scores(model, one.config, prefix)
        finally:
            self.shared.drop()
        blank = Outcome(
            one.name,
            one.choice,
            FINISHED,
            "",
            0,
            int(report.get("adapter_step") or report["steps"]),
            scores=scores,
        )
        return replace(
            blank,
            step=int(report["steps"]),
            seconds=float(report["seconds"]),
            tokens_per_second=float(report["tokens_per_second"]),
            peak=int(report["peak_memory_bytes"]),
            growth=int(report["memory_growth_bytes"]),
        )


@dataclass(slots=True)
class _Seen:
    """What is known of a candidate's run from its events. It is to run until a step."""

    until: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    replays: bool = False
    report: TrainReport | None = None

    def on(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.step, self.tokens, self.seconds = (
                event.step,
                self.tokens + event.tokens,
                self.seconds + event.seconds,
            )
        elif isinstance(event, PrefixCache):
            self.replays = event.where != "off"  # training has proved that it is exact
        elif isinstance(event, TrainReport):
            self.report = event

    def outcome(self, blank: Outcome, scores: Scores, job: Job, before: float) -> Outcome:
        """What became of the candidate: finished where there is a report, else paused. It ran for `before` seconds in
        earlier rounds."""
        found = replace(
            blank,
            status=PAUSED,
            step=self.step,
            seconds=before + self.seconds,
            tokens_per_second=self.tokens / max(1e-9, self.seconds),
            peak=peak_memory(job.device),
            growth=peak_memory(job.device) - job.memory_before,
            scores=scores,
        )
        if self.report is None:
            return found
        return replace(
            found,
            status=FINISHED,
            steps=self.report.adapter_step,
            seconds=self.report.seconds,
            tokens_per_second=self.report.tokens_per_second,
        )


def _until(one: Candidate, ahead: Ahead, share: float) -> int:
    """The step that ends a round of halving."""
    return max(1, round((ahead.costs[one.name].steps or 1) * share))
