"""What a report page begins with: the model, how each run was made, and in a sentence what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorafit import __version__
from lorafit.model import ModelMap
from lorafit.report.markup import Html, el
from lorafit.report.run import Run, steps_text
from lorafit.results import AdapterScore, EvalReport
from lorafit.system import environment
from lorafit.units import seconds_text, short

MOST = 6  # adapters that have a sentence each

VERSIONS = ("lorafit", "torch", "transformers", "peft", "python")


def head(title: str, found: ModelMap, runs: Sequence[Run], report: EvalReport | None) -> Html:
    """The title, the model, and of the run and of the evaluation when, where, with which versions and by which command.
    Several runs have that in their own sections."""
    about = (
        f"{found.model}, {found.architecture}, {short(found.total_params)} parameters. lorafit {__version__}"
    )
    parts = [el("h1", title), el("p", about, cls="soft")]
    made = [("Trained", facts_of(run)) for run in runs if len(runs) == 1]
    made += [("Evaluated", environment())] if report is not None else []
    for what, facts in made:
        if not facts:
            continue
        named = [f"{name} {facts[name]}" for name in VERSIONS if facts.get(name, "none") != "none"]
        date = str(facts.get("date", "")).replace("T", " ")[:16]
        where = [str(facts[name]) for name in ("device", "processor") if facts.get(name)]
        words = [f"{what} {date}".strip(), *dict.fromkeys(where), *named]
        parts.append(el("p", el("small", ", ".join(words))))
        if facts.get("command"):
            parts.append(el("pre", str(facts["command"])))
    return Html("".join(parts))


def facts_of(run: Run) -> Mapping[str, object]:
    """The environment that a run recorded; empty where it recorded none."""
    facts = run.first("started").get("environment")
    return facts if isinstance(facts, Mapping) else {}


def verdict(runs: Sequence[Run], report: EvalReport | None) -> Html:
    """One sentence per adapter: its effect on the held-out loss, and whether it is significant; of several, first
    which is best."""
    if report is not None and report.base is not None:
        sentences = [_best(report)] if report.ranked else []
        if len(report.adapters) > MOST:
            better = sum(a.high < 0 for a in report.adapters)
            sentences.append(f"{better} of {len(report.adapters)} adapters are better than the base.")
        for a in report.adapters if len(report.adapters) <= MOST else ():
            name = a.path if len(report.adapters) > 1 else "The adapter"
            sentences.append(f"{name} {_effect(a, report.rows)}: loss {report.base.loss:.4f} → {a.loss:.4f}.")
    else:
        sentences = [_of_run(run, run.name if len(runs) > 1 else "The adapter") for run in runs]
    several = len(sentences) > 1 and report is not None
    shown = (
        el("p", text, cls="soft" if number and several else "verdict")
        for number, text in enumerate(sentences)
    )
    return Html("".join(shown))


def _of_run(run: Run, name: str) -> str:
    """What training did to the held-out loss."""
    losses, time = run.report["eval"], seconds_text(run.report["seconds"])
    if not losses:
        return f"{name} was trained for {steps_text(run.report)} ({time}), without held-out rows."
    before, after = losses["before"]["loss"], losses["after"]["loss"]
    effect = "lowers" if after < before else "raises" if after > before else "does not change"
    return f"{name} {effect} the held-out loss: {before:.4f} before, {after:.4f} after {steps_text(run.report)} ({time})."


def _best(report: EvalReport) -> str:
    """Which of several adapters has the lowest loss, and which others these rows cannot tell from it."""
    first, *others = report.ranked
    lowest = f"{first.path} has the lowest loss, {first.loss:.4f}"
    if report.rows < 2:
        return f"{lowest}, on one row: too few to tell adapters apart."
    same = [a.path for a in others if a.low <= 0 <= a.high]
    if same:
        return f"{lowest}; these rows do not tell it from {', '.join(same)}."
    below = min(a.delta for a in others)
    return f"{lowest}: {below:.4f} below the next, beyond the noise of these rows."


def _effect(score: AdapterScore, rows: int) -> str:
    if rows < 2:
        return "was evaluated on one row, too few for a confidence interval"
    interval = f"(95 % CI of the difference {score.low:+.4f} to {score.high:+.4f})"
    if score.low <= 0 <= score.high:
        return f"makes no significant difference on these rows {interval}"
    return f"is {'better' if score.high < 0 else 'worse'} than the base {interval}"
