"""A comparison's folder: what was asked for, the scores of each candidate, and each candidate's own run folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.compare.results import Cut, Outcome, Scores
from lorafit.errors import RequestError
from lorafit.jsonio import jsonable
from lorafit.outputs import COMPARISON, RUNS, writing
from lorafit.system import environment

ANSWER, TABLE, PAGE, SCORES = "compare.json", "compare.csv", "compare.html", "scores"
HALVING = "halving.json"
BASE = ".base"  # the name under which the base's scores lie among the candidates'


@dataclass(frozen=True, slots=True)
class CompareFolder:
    """Where a comparison is written; a candidate's run is `target / its name`."""

    target: Path

    def open(self, resume: bool) -> None:
        """Make the folder. Raises RequestError when it is there and is not resumed, or is not a comparison's."""
        there = self.target.exists() or self.target.is_symlink()
        if resume:
            if not (self.target / COMPARISON).is_file():
                raise RequestError(
                    f"`{self.target}` is not a comparison", "without --resume, a new one is made there"
                )
            return
        if there and not self.target.is_dir():
            raise RequestError(f"`{self.target}` is a file", "choose another -o")
        if there and any(self.target.iterdir()):
            goes_on = f"lorafit compare --resume {shlex.quote(str(self.target))} goes on with it; "
            hint = (
                f"{goes_on if (self.target / COMPARISON).is_file() else ''}another -o starts a new comparison"
            )
            raise RequestError(f"`{self.target}` exists", hint)
        try:
            (self.target / SCORES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"cannot write `{self.target}`: {error.strerror}", "choose another -o"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While here, no other process writes the comparison. Raises RequestError where one does; the lock ends with
        its process."""
        from lorafit.train import lock_folder

        try:
            give_back = lock_folder(self.target)
        except OSError as error:
            raise RequestError(
                f"cannot write `{self.target}`: {error.strerror}", "choose another -o"
            ) from None
        if give_back is None:
            raise RequestError(
                f"another process is writing `{self.target}`", "choose another -o, or wait for its end"
            )
        try:
            yield
        finally:
            give_back()

    def begin(self, request: Any, rows: Sequence[str], candidates: Mapping[str, str]) -> None:
        """Write what was asked for, with the digests of the rows and of each candidate. Raises RequestError where a
        comparison that goes on had others."""
        stored = self.request() if (self.target / COMPARISON).is_file() else None
        if stored is not None and stored.get("rows") != list(rows):
            raise RequestError(
                f"the rows are not those that `{self.target}` began with: the data has changed",
                "another -o compares on the data as they are",
            )
        known = candidates if stored is None else stored.get("candidates", candidates)
        if other := next((n for n in {**known, **candidates} if known.get(n) != candidates.get(n)), ""):
            raise RequestError(
                f"`{other}` is not the candidate that `{self.target}` began with: the grid, the run file, a preset or "
                "the model has changed",
                "choose another -o for what is asked for now",
            )
        if stored is None:
            begun = {"rows": list(rows), "candidates": dict(candidates), "environment": environment()}
            self.write_json(COMPARISON, {**jsonable(request), **begun})

    def environment(self) -> dict[str, str]:
        """Versions, machine, command and date of its beginning."""
        return dict(self.request().get("environment") or {})

    def request(self) -> dict[str, Any]:
        """What was asked for. Raises RequestError when that is damaged."""
        try:
            found = json.loads((self.target / COMPARISON).read_text(encoding="utf-8"))
            assert isinstance(found, dict)
        except (OSError, ValueError, AssertionError):
            raise RequestError(
                f"`{self.target / COMPARISON}` is damaged", "another -o starts again"
            ) from None
        return found

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder beside its place, and rename it. Raises RunError where that fails."""
        path = self.target / name
        with writing(self.target):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.new")
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(jsonable(value), ensure_ascii=False) + "\n")

    def run(self, name: str) -> Path:
        """The folder of a candidate's run."""
        return self.target / name

    def keep(self, outcome: Outcome) -> None:
        """Write what became of a candidate."""
        self.write_json(f"{SCORES}/{outcome.name}.json", outcome.as_json())

    def keep_base(self, scores: Scores) -> None:
        self.write_json(f"{SCORES}/{BASE}.json", scores.as_json())

    def base(self) -> Scores | None:
        """The base's scores; None where there are none, or they are damaged."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            return Scores.of(self._read(BASE))
        return None

    def outcome(self, name: str) -> Outcome | None:
        """What became of a candidate; None where nothing is known, or it is damaged."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            return Outcome.of(self._read(name))
        return None

    def keep_cut(self, cut: Cut) -> None:
        """Write which choices a round of halving dropped."""
        self.write_json(HALVING, [*self.cuts(), cut])

    def cuts(self) -> list[Cut]:
        """The rounds of halving that were decided."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads((self.target / HALVING).read_text(encoding="utf-8"))
            return [Cut(c["share"], tuple(c["kept"]), tuple(c["dropped"])) for c in found]
        return []

    def _read(self, name: str) -> Mapping[str, Any]:
        found = json.loads((self.target / SCORES / f"{name}.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(name)
        return found


def new_folder(stem: str) -> Path:
    """`runs/compare-STEM-1`, or the first number that is free."""
    number = 1
    while (path := Path(RUNS) / f"compare-{stem}-{number}").exists():
        number += 1
    return path
