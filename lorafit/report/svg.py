"""Charts as SVG: loss, learning rate and gradient norm of a run, drawn without a library."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.report.markup import Html, el, is_number
from lorafit.report.run import Run
from lorafit.units import count, figures

POINTS = 400  # points of a curve that are drawn: each the mean of a stretch of steps
WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
LARGE, SMALL = 300, 180  # heights
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
        el("span", Html(f'<span style="color:var(--c{n % COLOURS})">●</span> '), run.folder.name, cls="key")
        for n, run in enumerate(runs)
    ]
    parts: list[Html] = [
        el("h2", "Training"),
        el("p", legend) if len(runs) > 1 else Html(""),
        el("h3", "Loss"),
        el("p", el("small", "Nats per target token: each step (faint), running mean, held-out rows (dots).")),
        el("div", picture, cls="wide"),
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
                el("div", small, cls="wide"),
            ]
    return el("section", parts)


def chart(series: Sequence[Curve], title: str, height: int, *, smooth: bool) -> Html:
    """One chart with a line per curve, `height` units high. With `smooth`, the steps are faint under their
    running mean. Empty if there is no point."""
    every = [point for curve in series for point in (*curve.steps, *curve.marks)]
    if not every:
        return Html("")
    top, low = max(y for _, y in every), min(y for _, y in every)
    low = 0.0 if 0 <= low < top / 2 else low - (top - low) / 10  # start at zero where it costs little room
    last = max(x for x, _ in every) or 1.0

    def at(x: float, y: float) -> Point:
        across = LEFT + x / last * (WIDTH - LEFT - RIGHT)
        return across, TOP + (top - y) / ((top - low) or 1) * (height - TOP - BOTTOM)

    parts = list(_axes(at, low, top, last, height))
    for number, curve in enumerate(series):
        colour = f"var(--c{number % COLOURS})"
        lines = [(curve.steps, 0.3, 1), (_smooth(curve.steps), 1, 2)] if smooth else [(curve.steps, 1, 2)]
        for line, opacity, width in lines:
            if line:
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
                parts.append(
                    Html(
                        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
                        f'opacity="{opacity}"/>'
                    )
                )
        for x, y in (at(*point) for point in curve.marks):
            parts.append(
                Html(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" stroke="var(--back)"/>')
            )
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=f"{title} by step")


def scatter(points: Sequence[tuple[str, float, float]], marked: Container[str], across: str, up: str) -> Html:
    """A chart of named points (name, x, y); those that are marked are joined by a line and carry their names.
    Empty without points."""
    if not points:
        return Html("")
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    low, top, last = min(ys), max(ys), max(xs) or 1.0
    low, top = low - (top - low) / 12 - 1e-9, top + (top - low) / 12

    def at(x: float, y: float) -> Point:
        return (
            LEFT + x / last * (WIDTH - LEFT - RIGHT - 90),
            TOP + (top - y) / ((top - low) or 1) * (LARGE - TOP - BOTTOM),
        )

    parts = list(_axes(at, low, top, last, LARGE, across))
    joined = " ".join(
        "{:.1f},{:.1f}".format(*at(x, y))
        for name, x, y in sorted(points, key=lambda p: p[1])
        if name in marked
    )
    parts.append(Html(f'<polyline points="{joined}" fill="none" stroke="var(--c0)" stroke-width="1.5"/>'))
    for name, x, y in points:
        across_px, up_px = at(x, y)
        colour = "var(--c0)" if name in marked else "var(--soft)"
        dot = el("title", f"{name}: {figures(y, 4)} at {figures(x)}")
        parts.append(
            Html(
                f'<circle cx="{across_px:.1f}" cy="{up_px:.1f}" r="4.5" fill="{colour}" stroke="var(--back)">{dot}</circle>'
            )
        )
        if name in marked:
            parts.append(el("text", name, x=f"{across_px + 7:.1f}", y=f"{up_px - 6:.1f}"))
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {LARGE}", role="img", aria_label=f"{up} by {across}")


def _axes(
    at: Callable[[float, float], Point],
    low: float,
    top: float,
    last: float,
    height: int,
    across: str = "step",
) -> Iterator[Html]:
    """Grid lines with their values, and below what goes across, whole numbers alone for steps."""
    ticks = _ticks(low, top)
    places = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 1
    for value in ticks:
        _, y = at(0, value)
        yield Html(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        text = f"{value:.{places}f}" if places <= 4 else figures(value, 2)
        yield el("text", text, x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end")
    for value in _ticks(0, last):
        if value == round(value) or across != "step":
            x, _ = at(value, low)
            shown = count(round(value)) if value == round(value) else figures(value, 2)
            yield el("text", shown, x=f"{x:.1f}", y=height - 14, text_anchor="middle")
    yield el("text", across, x=WIDTH - RIGHT, y=height - 2, text_anchor="end")


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


def _ticks(low: float, high: float) -> list[float]:
    """Round values between the two: two to eight of them."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 8)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
