"""What became of a candidate, and the whole comparison: what the screen, the page and the files show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorafit.evaluate import RowScore

FINISHED, FAILED, DROPPED, PAUSED = "finished", "failed", "dropped", "paused"


@dataclass(frozen=True, slots=True)
class Scores:
    """A score for each held-out row, and for each row of the texts that were not to change, by file."""

    rows: tuple[RowScore, ...]
    also: Mapping[str, tuple[RowScore, ...]] = field(default_factory=dict, hash=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": list(map(_written, self.rows)),
            "also": {n: list(map(_written, s)) for n, s in self.also.items()},
        }

    @staticmethod
    def of(data: Mapping[str, Any]) -> Scores:
        """What `as_json` wrote. Raises TypeError or KeyError for anything else."""
        return Scores(
            tuple(RowScore(*row) for row in data["rows"]),
            {str(name): tuple(RowScore(*row) for row in rows) for name, rows in data["also"].items()},
        )


def _written(score: RowScore) -> list[Any]:
    return [score.loss_sum, score.tokens, score.correct, score.short, score.weighted]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate: finished, failed with its reason, or with --halving paused or dropped after `step`
    of `steps`. A finished one's `steps` are those of the adapter that it kept. `peak` and `growth` are bytes: of the process, and beyond what it held before the model was loaded."""

    name: str
    choice: str
    status: str
    reason: str = ""
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak: int = 0
    growth: int = 0
    scores: Scores | None = None

    def as_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "scores"}
        return {**plain, "scores": self.scores.as_json() if self.scores else None}

    @staticmethod
    def of(data: Mapping[str, Any]) -> Outcome:
        """What `as_json` wrote. Raises TypeError or KeyError for anything else."""
        scores = Scores.of(data["scores"]) if data["scores"] else None
        return Outcome(**{**data, "scores": scores})


@dataclass(frozen=True, slots=True)
class Began:
    """A candidate starts or resumes: candidate `number` of `of`."""

    name: str
    number: int
    of: int
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """A candidate has come to its end, or to that of a round of halving."""

    outcome: Outcome
    loss: float | None
    base_loss: float


@dataclass(frozen=True, slots=True)
class Cut:
    """A round of halving: which choices go on after that share of the steps, and which are dropped."""

    share: float
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
