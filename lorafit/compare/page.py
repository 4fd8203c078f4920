"""`compare.html`: the answer, the table, strategy × band as a heat map, curves, what costs what, rows that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorafit import __version__
from lorafit.compare.answer import EQUAL, Answer, ChoiceRow
from lorafit.compare.results import Outcome
from lorafit.model import ModelMap
from lorafit.report import (
    COLOURS,
    Curve,
    Html,
    chart,
    document,
    el,
    read_back,
    scatter,
    series,
    table,
    thinned,
)
from lorafit.units import bytes_text, count, figures, rows_text, seconds_text, short

MOST_ROWS = 6  # held-out rows that are shown
DRAWN = 280  # height of a chart
VERDICTS = {EQUAL: "same"}  # the words of the table, where they are not those of the answer


@dataclass(frozen=True, slots=True)
class RowApart:
    """A held-out row on which the choices differ most: where it is, its text, and the loss per token of each choice."""

    where: str
    text: str
    losses: Mapping[str, float]


def compare_page(answer: Answer, found: ModelMap, apart: Sequence[RowApart] = ()) -> str:
    """The page: one file, nothing fetched, no script."""
    parts: list[Html] = [
        el("h1", f"Strategies and bands on {found.model}"),
        el(
            "p",
            f"{count(len(answer.choices))} choices, {rows_text(answer.rows)} held out with {count(answer.tokens)} "
            f"supervised tokens, base loss {answer.base_loss:.4f}. lorafit {__version__}",
            cls="soft",
        ),
        *(el("p", _named(text), cls="verdict") for text in answer.words),
    ]
    if answer.command:
        parts.append(el("pre", answer.command))
    if answer.choices:
        parts += [_table(answer.choices), _heat(answer.choices), _curves(answer), _costs(answer.choices)]
        parts.append(_hint(answer))
        parts += [_forgetting(answer.choices), _rows(apart, answer.choices)]
    parts += [_missing(answer), _begun(answer)]
    return document(f"{found.model}: strategies and bands", parts)


def _begun(answer: Answer) -> Html:
    """What made the page: the command, versions, machine and date."""
    if not answer.environment:
        return Html("")
    facts = {name: value for name, value in answer.environment.items() if name != "command"}
    return el(
        "section",
        el("h2", "To reproduce"),
        el("pre", answer.environment.get("command", "")),
        table(["", ""], [[name, value] for name, value in facts.items()], 2),
    )


def _named(text: str) -> list[str]:
    """A sentence with what stands between backticks as code."""
    return [el("code", piece) if number % 2 else piece for number, piece in enumerate(text.split("`"))]


def _table(choices: Sequence[ChoiceRow]) -> Html:
    several = any(c.spread is not None for c in choices)
    head = [
        "choice",
        "loss",
        "verdict",
        "to the lowest",
        *(["spread"] if several else []),
        "accuracy",
        "trainable",
        "time",
        "memory",
    ]
    head += ["p", "to the base", "rank", "rate", "adapter", "tok/s"]
    rows = []
    for c in choices:
        rows.append(
            [
                c.choice,
                f"{c.loss:.4f}",
                VERDICTS.get(c.verdict, c.verdict),
                f"{c.delta:+.4f} ± {c.error:.4f}" if c is not choices[0] else "",
                *([f"{c.spread:.4f}" if c.spread is not None else ""] if several else []),
                f"{c.accuracy:.1%}",
                short(c.trainable_params),
                seconds_text(c.seconds),
                bytes_text(c.growth),
                "" if c is choices[0] else figures(c.p, 2) if c.p >= 0.001 else "< 0.001",
                f"{c.gain:+.4f} ± {c.gain_error:.4f}",
                str(c.rank),
                figures(c.learning_rate, 2),
                bytes_text(c.adapter_bytes),
                short(c.tokens_per_second),
            ]
        )
    about = (
        f"By held-out loss{'; spread is its standard deviation over seeds' * several}; same is what is not distinguishable from the lowest. "
        f"± is the standard error of the difference, over rows (paired){' and seeds' * several}; p is "
        "corrected for the number of comparisons (Holm). Time is that of training steps; memory is what the process grew by."
    )
    return el("section", el("h2", "Choices"), table(head, rows, whole=True), el("p", el("small", about)))


def _heat(choices: Sequence[ChoiceRow]) -> Html:
    """Strategy × band; where a cell has several choices, the lowest loss."""
    presets, bands = (
        list(dict.fromkeys(c.preset for c in choices)),
        list(dict.fromkeys(c.layers for c in choices)),
    )
    if len(presets) < 2 or len(bands) < 2:
        return Html("")
    order = ["basic", "attention", "extended", "ffn", "all"]
    presets.sort(key=lambda p: order.index(p) if p in order else 9)
    bands.sort(
        key=lambda b: ["low", "mid", "high", "all"].index(b) if b in ("low", "mid", "high", "all") else 9
    )
    best: dict[tuple[str, str], ChoiceRow] = {}
    for c in choices:  # from the lowest loss on
        best.setdefault((c.preset, c.layers), c)
    losses = [c.loss for c in best.values()]
    low, span = min(losses), (max(losses) - min(losses)) or 1.0
    rows = []
    for preset in presets:
        cells = []
        for band in bands:
            if (preset, band) not in best:
                cells.append(el("td", "–"))
                continue
            c = best[preset, band]
            depth = round(70 * (1 - (c.loss - low) / span))
            mark = " ●" if c.verdict != "worse" else ""
            cells.append(
                el(
                    "td",
                    f"{c.loss:.3f}{mark}",
                    style=f"background: color-mix(in srgb, var(--c2) {depth}%, transparent)",
                    title=c.choice,
                )
            )
        rows.append(el("tr", el("th", preset), cells))
    head = el("tr", el("th"), [el("th", band) for band in bands])
    one = ", the lowest loss of its candidates" if len(best) < len(choices) else ""
    about = (
        f"Held-out loss of each strategy in each band{one}; greener is lower, "
        "● is not beyond noise of the lowest."
    )
    return el(
        "section", el("h2", "Strategy × band"), el("div", el("table", head, rows, cls="heat"), cls="wide"),
        el("p", el("small", about)),
    )  # fmt: skip


def _curves(answer: Answer) -> Html:
    """Training loss of the best choices, as many as there are colours; held-out losses as dots."""
    drawn = []
    for c in answer.choices[:COLOURS]:
        run = read_back(Path(answer.folder) / c.runs[0])
        curve = Curve(thinned(series(run, "step", "loss")), series(run, "evaluated", "loss"))
        if curve.steps:
            drawn.append((c.choice, curve))
    picture = chart([curve for _, curve in drawn], "loss", DRAWN, smooth=True)
    if not picture:
        return Html("")
    legend = [
        el("span", Html(f'<span style="color:var(--c{n % COLOURS})">●</span> '), name, cls="key")
        for n, (name, _) in enumerate(drawn)
    ]
    many = f" of the {len(drawn)} best choices" if len(drawn) < len(answer.choices) else ""
    about = (
        f"Loss per target token{many}, first seed: running mean of the training steps, dots on held-out rows."
    )
    return el(
        "section",
        el("h2", "Curves"),
        el("p", legend),
        picture,
        el("p", el("small", about)),
    )


def _costs(choices: Sequence[ChoiceRow]) -> Html:
    """Loss against time and against parameters, with those that no other beats in both."""
    time = scatter(
        [(c.choice, c.seconds, c.loss) for c in choices],
        {c.choice for c in choices if c.fast},
        "seconds",
        "held-out loss",
    )
    size = scatter(
        [(c.choice, c.trainable_params / 1000, c.loss) for c in choices],
        {c.choice for c in choices if c.small},
        "thousand parameters",
        "held-out loss",
    )
    return el(
        "section",
        el("h2", "Loss against cost"),
        el("p", el("small", "On the line are those that no other choice beats in both.")),
        el("h3", "Loss and time"),
        time,
        el("h3", "Loss and trainable parameters"),
        size,
    )


def _forgetting(choices: Sequence[ChoiceRow]) -> Html:
    if not choices[0].also:
        return Html("")
    head = ["choice", *(each.file for each in choices[0].also)]
    rows = [[c.choice, *(f"{each.delta:+.4f} ± {each.stderr:.4f}" for each in c.also)] for c in choices]
    about = "Loss less that of the base on text that the adapters should not change; above 0 is forgetting."
    return el("section", el("h2", "Forgetting"), table(head, rows), el("p", el("small", about)))


def _rows(apart: Sequence[RowApart], choices: Sequence[ChoiceRow]) -> Html:
    if not apart or len(choices) < 2:
        return Html("")
    parts: list[Html] = []
    for row in apart:
        order = sorted(row.losses, key=lambda name: row.losses[name])
        first, last = order[0], order[-1]
        head = f"{row.where}: {row.losses[first]:.3f} with {first}, {row.losses[last]:.3f} with {last}"
        parts.append(Html(el("p", head) + el("div", row.text, cls="said")))
    return el("section", el("h2", "Rows on which they differ most"), parts)


def _hint(answer: Answer) -> Html:
    """Roles × layers of the hint, and how well it ranked the choices."""
    hint = answer.hint
    if hint is None:
        return Html("")
    strongest = max(cell or 0.0 for cells in hint.signals.values() for cell in cells) or 1.0
    depth = max(map(len, hint.signals.values()))
    rows = [el("tr", el("th"), [el("th", str(n)) for n in range(depth)])]
    for role, cells in hint.signals.items():
        shown = []
        for cell in cells:
            share = 0 if cell is None else round(100 * cell / strongest)
            style = f"background: color-mix(in srgb, var(--c0) {round(0.7 * share)}%, transparent)"
            shown.append(el("td", "–" if cell is None else str(share), style=style))
        rows.append(el("tr", el("th", role), shown))
    agrees = ""
    if answer.hint_correlation is not None:
        agrees = f" Its ranking agrees with the measured one to {answer.hint_correlation:+.2f} (Spearman)."
    about = (
        "Gradient of an adapter at its start, by role and layer, as a percentage of the strongest. "
        f"It suggested {hint.suggested}: a hint, not a measurement.{agrees}"
    )
    return el(
        "section", el("h2", "The hint before training"), el("div", el("table", rows, cls="heat"), cls="wide"),
        el("p", el("small", about)),
    )  # fmt: skip


def _missing(answer: Answer) -> Html:
    lines = [f"{one.choice} is left out: {one.reason}" for one in answer.impossible]
    lines += [f"{name}: {reason}" for name, reason in answer.missing]
    for cut in answer.cuts:
        lines.append(f"after {cut.share:.0%} of the steps, dropped: {', '.join(cut.dropped) or 'none'}")
    lines += answer.notes
    return (
        el("section", el("h2", "Notes"), el("ul", [el("li", line) for line in lines])) if lines else Html("")
    )


def most_apart(
    outcomes: Mapping[str, Outcome], choices: Sequence[ChoiceRow], most: int = MOST_ROWS
) -> Iterator[tuple[int, dict[str, float]]]:
    """(number of a held-out row, the loss per token of each choice on it), those first on which the choices differ
    most: by the standard deviation of the loss per token."""
    found = {
        c.choice: np.mean(
            [
                [s.loss_sum / s.weight for s in scores.rows]
                for name in c.runs
                if (scores := outcomes[name].scores)
            ],
            axis=0,
        )
        for c in choices
    }
    if not found:
        return
    spread = np.std(list(found.values()), axis=0)
    for number in np.argsort(-spread, kind="stable")[:most]:
        yield int(number), {choice: float(losses[number]) for choice, losses in found.items()}
