"""The tables of `lorafit/docs/evidence.md` from the rows in ../results/evidence/.

    python tests/benchmarks/evidence/tables.py

Losses are per supervised token of the held-out rows. Errors are standard errors, paired over rows, with those of the seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorafit.compare import rank
from lorafit.compare.ranking import difference

RESULTS = Path(__file__).parent.parent / "results" / "evidence"
STRATEGIES, BANDS = ("basic", "attention", "extended", "ffn", "all"), ("low", "mid", "high", "all")
NAMES = {"gsm8k": "GSM8K", "stories": "Russian stories", "records": "sentence to JSON", "demo": "the demo"}


@dataclass(frozen=True)
class Part:
    """One comparison: what it was, the base's and each choice's losses, (seeds, rows), and what each row counts."""

    about: Mapping[str, Any]
    base: np.ndarray
    rows: Mapping[str, np.ndarray]
    weights: np.ndarray
    runs: Sequence[Mapping[str, Any]]
    also: Mapping[str, Mapping[str, float]]  # by text and choice: loss less the base's

    @property
    def title(self) -> str:
        return NAMES[self.about["task"]]


def read(path: Path) -> Part:
    """The part that lies in a file."""
    about, base, *runs = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    rows: dict[str, list[list[float]]] = {}
    for run in runs:
        rows.setdefault(f"{run['preset']}-{run['layers']}", []).append([loss for loss, _ in run["rows"]])
    also: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for text, scores in run["also"].items():
            change = _mean(scores) - _mean(base["also"][text])
            also.setdefault(text, {}).setdefault(f"{run['preset']}-{run['layers']}", []).append(change)
    weights = np.array([count for _, count in base["rows"]], dtype=float)
    return Part(
        about,
        np.array([[loss for loss, _ in base["rows"]]]),
        {choice: np.array(found) for choice, found in rows.items()},
        weights,
        runs,
        {text: {c: float(np.mean(v)) for c, v in found.items()} for text, found in also.items()},
    )


def _mean(scores: Sequence[Sequence[float]]) -> float:
    return sum(loss for loss, _ in scores) / sum(count for _, count in scores)


def parts() -> list[Part]:
    """All that there are, in the order of NAMES."""
    found = [RESULTS / f"{task}-{equal}.jsonl" for task in NAMES for equal in ("parameters", "time")]
    return [read(path) for path in found if path.is_file()]


def grid(part: Part) -> str:
    """Strategy × band: the loss less the base's. **Bold** is the lowest, *italic* what is not worse beyond noise."""
    ranked = {one.choice: one for one in rank(part.rows, part.weights)}
    best = next(iter(ranked))
    lines = [f"| {part.title} | " + " | ".join(BANDS) + " |", "|---" * (len(BANDS) + 1) + "|"]
    for strategy in STRATEGIES:
        cells = []
        for band in BANDS:
            choice = f"{strategy}-{band}"
            if choice not in ranked:
                cells.append("")
                continue
            change = ranked[choice].loss - float(part.base.sum() / part.weights.sum())
            mark = "**" if choice == best else "" if ranked[choice].worse else "*"
            cells.append(f"{mark}{change:+.3f}{mark}")
        lines.append(f"| `{strategy}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contrasts() -> dict[str, tuple[list[str], list[str]]]:
    """What is said of strategies and bands, as two groups of choices: the first is said to be better."""
    every = lambda strategies, bands: [f"{s}-{b}" for s in strategies for b in bands]  # noqa: E731
    three = ("low", "mid", "high")
    return {
        "`ffn` less `extended` (all of attention)": (every(["ffn"], BANDS), every(["extended"], BANDS)),
        "`attention` (q, k, v) less `basic` (q, v)": (every(["attention"], BANDS), every(["basic"], BANDS)),
        "`extended` (q, k, v, o) less `attention`": (every(["extended"], BANDS), every(["attention"], BANDS)),
        "`all` less `ffn`": (every(["all"], BANDS), every(["ffn"], BANDS)),
        "`high` less `low`": (every(STRATEGIES, ["high"]), every(STRATEGIES, ["low"])),
        "`mid` less `high`": (every(STRATEGIES, ["mid"]), every(STRATEGIES, ["high"])),
        "`all` layers less the best band": (every(STRATEGIES, ["all"]), every(STRATEGIES, three)),
    }


def contrast(part: Part, one: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
    """(difference of the mean losses of two groups of choices, its standard error over rows and seeds)."""
    mean = lambda choices: np.mean([part.rows[c] for c in choices if c in part.rows], axis=0)  # noqa: E731
    mine, theirs = mean(one), mean(other)
    delta, stderr = difference(mine, theirs, part.weights)
    seeds = (mine - theirs).sum(1) / part.weights.sum()
    spread = float(np.std(seeds, ddof=1) / np.sqrt(len(seeds))) if len(seeds) > 1 else 0.0
    return delta, float(np.hypot(stderr, spread))


def contrast_table(found: Sequence[Part]) -> str:
    """The contrasts, a column a task: difference ± standard error; below zero the first has the lower loss."""
    lines = [_head("held-out loss of", found)]
    for name, (one, other) in contrasts().items():
        cells = []
        for part in found:
            second = _best_band(part, other) if "best band" in name else other
            delta, error = contrast(part, one, second)
            cells.append(f"{delta:+.3f} ± {error:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best_band(part: Part, choices: Sequence[str]) -> list[str]:
    """Of the choices those of the band with the lowest loss."""
    by_band = [[c for c in choices if c.endswith(f"-{band}")] for band in BANDS[:-1]]
    return min(by_band, key=lambda group: np.mean([part.rows[c].sum() for c in group]))


def _head(what: str, found: Sequence[Part]) -> str:
    names = [NAMES[part.about["task"]] for part in found]
    return f"| {what} | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|"


def forgetting_table(found: Sequence[Part]) -> str:
    """By strategy and by band, how much the loss on the other tasks' text rose, mean over the texts."""
    found = [part for part in found if part.also]
    lines = [_head("trained on", found)]
    groups = {f"`{name}`": (0, name) for name in STRATEGIES}
    groups |= {f"`{name}` layers": (1, name) for name in BANDS}
    for shown, (at, name) in groups.items():
        means = []
        for part in found:
            changes = (text.items() for text in part.also.values())
            means.append(np.mean([v for text in changes for c, v in text if c.split("-")[at] == name]))
        lines.append(f"| {shown} | " + " | ".join(f"{mean:+.3f}" for mean in means) + " |")
    return "\n".join(lines)


def tables() -> dict[str, list[str]]:
    """The tables of the page, by what is equal."""
    found: dict[str, list[Part]] = {"parameters": [], "time": []}
    for part in parts():
        found[part.about["equal"]].append(part)
    return {
        equal: [
            *map(grid, of),
            contrast_table(of),
            *([forgetting_table(of)] if any(p.also for p in of) else []),
        ]
        for equal, of in found.items()
        if of
    }


if __name__ == "__main__":
    for made in tables().values():
        print("\n\n".join(made) + "\n")
