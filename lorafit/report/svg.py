"""Charts as SVG: the lines of a run, drawn without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafit.report.markup import Html, el, is_number
from lorafit.report.run import Run
from lorafit.units import count

POINTS = 400  # of a curve that are drawn: means of as many stretches of steps

WIDTH, HEIGHT = 720, 300

LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34

CURVES = 6  # colours there are


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """As many means of neighbours as are drawn."""
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over a twentieth of the curve."""
    reach = max(1, len(points) // 40)
    found = []
    for at, (x, _) in enumerate(points):
        near = points[max(0, at - reach) : at + reach + 1]
        found.append((x, sum(y for _, y in near) / len(near)))
    return found


def curves(runs: Sequence[Run]) -> Html:
    """Loss against step: each step's, faint, their running mean, and the held-out loss as marks."""
    drawn: list[tuple[str, list[tuple[float, float]], list[tuple[float, float]]]] = []
    for run in runs:
        steps = [(float(e["step"]), float(e["loss"])) for e in run.every("step") if is_number(e.get("loss"))]
        held = [
            (float(e["step"]), float(e["loss"])) for e in run.every("evaluated") if is_number(e.get("loss"))
        ]
        drawn.append((run.folder.name, _thinned(steps), held))
    everything = [point for _, steps, held in drawn for point in (*steps, *held)]
    if not everything:
        return Html("")
    top, low = max(y for _, y in everything), min(y for _, y in everything)
    low = 0.0 if low < top / 2 else low - (top - low) / 10  # zero is shown where it costs little room
    last = max(x for x, _ in everything) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / last * (WIDTH - LEFT - RIGHT)
        return across, TOP + (top - y) / ((top - low) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = []
    ticks = _ticks(low, top)
    places = max(0, -math.floor(math.log10(ticks[1] - ticks[0]))) if len(ticks) > 1 else 1
    for value in ticks:
        _, y = at(0, value)
        parts.append(
            Html(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        )
        parts.append(el("text", f"{value:.{places}f}", x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for value in _ticks(0, last):
        x, _ = at(value, low)
        parts.append(el("text", count(round(value)), x=f"{x:.1f}", y=HEIGHT - 14, text_anchor="middle"))
    parts.append(el("text", "step", x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"))
    for number, (_, steps, held) in enumerate(drawn):
        colour = f"var(--c{number % CURVES})"
        for line, opacity, width in ((steps, 0.3, 1), (_smooth(steps), 1, 2)):
            line_at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
            parts.append(
                Html(
                    f'<polyline points="{line_at}" fill="none" stroke="{colour}" stroke-width="{width}" '
                    f'opacity="{opacity}"/>'
                )
            )
        for x, y in (at(*point) for point in held):
            parts.append(
                Html(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" stroke="var(--back)"/>')
            )
    legend = [
        el("span", Html(f'<span style="color:var(--c{n % CURVES})">●</span> '), name + "  ")
        for n, (name, _, _) in enumerate(drawn)
    ]
    said = "Loss in nats per supervised token: each step's (faint), their running mean, held out (dots)."
    label = "loss against step"
    picture = el("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    return el(
        "section",
        el("h2", "Training"),
        el("div", picture, cls="wide"),
        el("p", el("small", said)),
        el("p", legend),
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round values from the one to the other: four to eight of them."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 8)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
