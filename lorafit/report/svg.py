"""Charts as SVG: loss, learning rate and gradient norm of a run, drawn without a library."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.report.markup import Html, el, is_number
from lorafit.report.run import Run
from lorafit.units import count, figures

POINTS = 400  # points of a curve that are drawn: each the mean of a stretch of steps
SIDE = 1000  # of the square that a chart is drawn in
LARGE, SMALL = 260, 150  # heights in pixels
ACROSS = 5  # values below a chart, at most: more do not fit on a phone
LETTER, LINE = 15, 60  # of a name in a chart: about its width and height, in the square
COLOURS = 6

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's line in a chart: (step, value) of every step, and marks at single steps."""

    steps: list[Point]
    marks: list[Point]


def curves(runs: Sequence[Run]) -> Html:
    """The training section: loss, learning rate and gradient norm by step. Empty if nothing was recorded."""
    loss = [Curve(thinned(series(run, "step", "loss")), series(run, "evaluated", "loss")) for run in runs]
    picture = chart(loss, "loss", LARGE, smooth=True)
    if not picture:
        return Html("")
    legend = [
        el("span", Html(f'<span style="color:var(--c{n % COLOURS})">●</span> '), run.name, cls="key")
        for n, run in enumerate(runs)
    ]
    parts: list[Html] = [
        el("h2", "Training"),
        el("p", legend) if len(runs) > 1 else Html(""),
        el("h3", "Loss"),
        el("p", el("small", "Nats per target token: each step (faint), running mean, held-out rows (dots).")),
        picture,
    ]
    for field, title, about in (
        ("learning_rate", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "Before clipping: each step (faint), running mean."),
    ):
        steps = [Curve(thinned(series(run, "step", field)), []) for run in runs]
        small = chart(steps, title.lower(), SMALL, smooth=bool(about))
        if small:
            parts += [
                el("h3", title),
                el("p", el("small", about)) if about else Html(""),
                small,
            ]
    return el("section", parts)


def chart(series: Sequence[Curve], title: str, height: int, *, smooth: bool) -> Html:
    """One chart with a line per curve, `height` pixels high and as wide as there is room. With `smooth`, the steps are
    faint under their running mean. Empty if there is no point."""
    every = [point for curve in series for point in (*curve.steps, *curve.marks)]
    if not every:
        return Html("")
    top, low = max(y for _, y in every), min(y for _, y in every)
    low = 0.0 if 0 <= low < top / 2 else low - (top - low) / 10  # start at zero where it costs little room
    frame = Frame(low, top, max(x for x, _ in every) or 1.0)
    parts: list[Html] = []
    for number, curve in enumerate(series):
        colour = f"var(--c{number % COLOURS})"
        lines = [(curve.steps, 0.3, 1), (_smooth(curve.steps), 1, 2)] if smooth else [(curve.steps, 1, 2)]
        parts += [_line(frame, line, colour, width, opacity) for line, opacity, width in lines if line]
        parts += [_dot(frame, x, y, colour) for x, y in curve.marks]
    return _drawn(frame, parts, (), height, "step", title)


def scatter(points: Sequence[tuple[str, float, float]], marked: Container[str], across: str, up: str) -> Html:
    """A chart of named points (name, x, y); those that are marked are joined by a line and carry their names, as far as
    there is room. Empty without points."""
    if not points:
        return Html("")
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    low, top = min(ys), max(ys)
    frame = Frame(low - (top - low) / 12 - 1e-9, top + (top - low) / 6, max(xs) or 1.0)
    line = sorted((x, y) for name, x, y in points if name in marked)
    parts, names, taken = [_line(frame, line, "var(--c0)", 1.5)], [], list[Point]()
    for name, x, y in points:
        colour = "var(--c0)" if name in marked else "var(--soft)"
        parts.append(_dot(frame, x, y, colour, f"{name}: {figures(y, 4)} at {figures(x)}"))
        if name in marked:
            left = x > frame.last / 2
            across_name, up_name = frame.at(x, y)
            across_name -= LETTER * len(name) if left else 0
            room = all(abs(across_name - a) > LETTER * len(name) or abs(up_name - b) > LINE for a, b in taken)
            if room:  # the others show theirs when they are pointed at
                taken.append((across_name, up_name))
                names.append(el("span", name, cls="named left" if left else "named", style=frame.place(x, y)))
    return _drawn(frame, parts, names, LARGE, across, up)


@dataclass(frozen=True, slots=True)
class Frame:
    """What a chart shows: from 0 to `last` across, from `low` to `top` upwards. It is drawn in a square that is stretched
    to the room there is; texts lie over it and are not."""

    low: float
    top: float
    last: float

    def at(self, x: float, y: float) -> Point:
        """A point in the square."""
        return SIDE * x / self.last, SIDE * (self.top - y) / ((self.top - self.low) or 1)

    def place(self, x: float | None = None, y: float | None = None) -> str:
        """The same as a style."""
        across, down = self.at(x or 0.0, self.low if y is None else y)
        sides = [f"left:{across / SIDE:.2%}"] if x is not None else []
        return ";".join([*sides, *([f"top:{down / SIDE:.2%}"] if y is not None else [])])


def _line(frame: Frame, points: Sequence[Point], colour: str, width: float, opacity: float = 1) -> Html:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.at(*point) for point in points))
    return Html(
        f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'
    )


def _dot(frame: Frame, x: float, y: float, colour: str, text: str = "") -> Html:
    """A line without length and with round ends: it stays round where the square is stretched."""
    across, down = frame.at(x, y)
    ends = f'd="M{across:.1f} {down:.1f}h.01" stroke-linecap="round"'
    name = el("title", text) if text else Html("")
    return Html(
        f'<path {ends} stroke="var(--back)" stroke-width="11"/>'
        f'<path class="dot" {ends} stroke="{colour}" stroke-width="9">{name}</path>'
    )


def _drawn(
    frame: Frame, parts: Sequence[Html], names: Sequence[Html], height: int, across: str, up: str
) -> Html:
    """The chart: grid lines with their values, and below what goes across, whole numbers alone for steps."""
    lines, texts = [], list(names)
    ticks = _ticks(frame.low, frame.top)
    places = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 1
    for value in ticks:
        _, y = frame.at(0, value)
        lines.append(Html(f'<path d="M0 {y:.1f}H{SIDE}" stroke="var(--line)"/>'))
        text = f"{value:.{places}f}" if places <= 4 else figures(value, 2)
        texts.append(el("span", text, cls="up", style=frame.place(y=value)))
    for value in _ticks(0, frame.last, ACROSS):
        if value == round(value) or across != "step":
            shown = count(round(value)) if value == round(value) else figures(value, 2)
            texts.append(el("span", shown, cls="across", style=frame.place(value)))
    texts.append(el("span", across, cls="axis"))
    picture = el(
        "svg", lines, parts, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", role="img",
        aria_label=f"{up} by {across}",
    )  # fmt: skip
    return el("div", picture, texts, cls="chart", style=f"height:{height}px")


def series(run: Run, kind: str, field: str) -> list[Point]:
    """(step, value) of that field in the events of a kind, without what is not a finite number."""
    events: list[dict[str, Any]] = run.every(kind)
    return [(float(e["step"]), float(e[field])) for e in events if is_number(e.get(field))]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most POINTS points: means of neighbours."""
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean over a twentieth of the curve."""
    reach = max(1, len(points) // 40)
    means = []
    for at, (x, _) in enumerate(points):
        near = points[max(0, at - reach) : at + reach + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def _ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round values between the two: two to nine of them, or about as many as `most`."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= most)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
