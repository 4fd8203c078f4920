"""One page that shows a run, or several side by side: self-contained HTML, nothing fetched, no script.

All text from data, names or settings is escaped where it enters an element.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lorafit.events import DataReport
from lorafit.model import ModelMap, Slot, Stack
from lorafit.report.markup import Html, el, is_number, table
from lorafit.report.run import Run, name_without
from lorafit.report.summary import facts_of, head, verdict
from lorafit.report.svg import curves
from lorafit.results import AdapterScore, EvalReport, Group, RowChange, Score
from lorafit.units import bytes_text, count, deviation, figures, percent, seconds_text, short

PAGE_MARK = '<meta name="generator" content="lorafit">'  # by which lorafit knows its own pages

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6570; --line: #d5dae0; --back: #ffffff;
  --card: #f5f7f9; --mark: #fff3c4; --c0: #1a63b8; --c1: #b4471c; --c2: #2c7a4b; --c3: #7c3fa8; --c4: #8a6d00; --c5: #a3245c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa4af; --line: #37404a; --back: #14181d;
  --card: #1d232a; --mark: #4d4313; --c0: #6aaef7; --c1: #f19a6b; --c2: #74c796; --c3: #c59be6; --c4: #dcbf4a; --c5: #f087b3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p { margin: .4rem 0; } .verdict { font-size: 1.1rem; } .key { margin-right: 1rem; } .soft { color: var(--soft); } small { color: var(--soft); }
.wide { overflow-x: auto; max-width: 100%; }
table { margin: .6rem 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } td.n, th.n { text-align: right; white-space: nowrap; }
td.name { min-width: 9rem; }
.whole { width: max-content; min-width: 100%; max-width: calc(100vw - 3rem); position: relative; left: 50%; transform: translateX(-50%);
  font-size: 14px; }
@media (max-width: 40rem) { .whole { font-size: 13px; } .whole th, .whole td { padding-right: .5rem; } .whole td.name { min-width: 5.5rem; } }
.map th, .map td { padding: 0 1px; border: 0; text-align: center; font-size: 11px; line-height: 1.3; }
.map th.role { text-align: right; padding-right: .5rem; font-size: 13px; font-weight: 400; color: var(--ink); }
.heat td { text-align: center; padding: .45rem .7rem; border: 2px solid var(--back); white-space: nowrap; }
.map td { min-width: 15px; color: var(--soft); line-height: 1.1; } .map td.on { color: var(--c0); font-size: 17px; }
.chart { position: relative; margin: .8rem 1rem 2.8rem 3.4rem; } .chart svg { display: block; width: 100%; height: 100%; overflow: visible; }
.chart svg * { vector-effect: non-scaling-stroke; fill: none; }
.chart > span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap; }
.chart .up { right: calc(100% + .5rem); transform: translateY(-50%); } .chart .across { top: calc(100% + .5rem); transform: translateX(-50%); }
.chart .axis { top: calc(100% + 1.5rem); right: 0; } .chart .named { transform: translate(.5rem, -140%); color: var(--ink); }
.chart .left { transform: translate(calc(-100% - .5rem), -140%); }
pre, .said { white-space: pre-wrap; background: var(--card); border-radius: 4px; padding: .5rem .7rem; margin: .3rem 0;
  font: 14px/1.45 ui-monospace, monospace; }
mark { background: var(--mark); color: inherit; font-weight: 600; }
dl { margin: .4rem 0; } dt { color: var(--soft); } dd { margin: 0 0 .5rem; }
details summary { cursor: pointer; margin-top: 2.5rem; font-weight: 600; }
"""


def make_page(
    title: str,
    found: ModelMap,
    adapted: Mapping[str, Sequence[str]],
    runs: Sequence[Run],
    report: EvalReport | None = None,
) -> str:
    """The page. `adapted` has the names of the modules that each adapter adapts, by its path; `runs` are
    the lorafit runs among them; `report` is their evaluation, if there is one."""
    finished = [run for run in runs if run.report]
    parts: list[Html] = [head(title, found, finished, report), verdict(finished, report)]
    for path, modules in adapted.items():
        parts.append(_map(found, path if len(adapted) > 1 else "", modules))
    if finished:
        parts += [curves(finished), _epochs(finished), _predicted(finished)]
    if report is not None:
        parts += _evaluated(report)
    for run in finished:
        parts += [_said(run), _data(run), _environment(run), _settings(run)]
    return document(title, parts)


def document(title: str, parts: Iterable[Html]) -> str:
    """A page of these parts, with the style of all pages."""
    body = el("body", [part for part in parts if part])
    head = el(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(PAGE_MARK),
        el("title", title),
        Html(f"<style>{STYLE}</style>"),
    )
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def write_page(path: Path, text: str) -> None:
    """Write the page beside its place, then rename it. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _map(found: ModelMap, path: str, modules: Sequence[str]) -> Html:
    """Layers × modules: which have an adapter."""
    chosen = set(modules)
    parts = [el("h2", "What was adapted" + (f": {path}" if path else ""))]
    inside = {s.path for s in (*found.slots, *found.unplaced) if s.layer >= 0}
    for stack in found.stacks:
        drawn = _stack(found, stack, chosen)
        if drawn:
            parts.append(drawn)
    beside = sorted(chosen - inside)
    if beside:
        parts.append(el("p", f"Outside the layers: {', '.join(beside)}."))
    return el("section", parts)


def _stack(found: ModelMap, stack: Stack, chosen: set[str]) -> Html:
    slots: dict[str, dict[int, Slot]] = {}
    for slot in (*found.slots, *found.unplaced):
        if slot.stack == stack.path and (slot.roles or slot.path in chosen):
            slots.setdefault(slot.tail, {})[slot.layer] = slot
    if not any(slot.path in chosen for by_layer in slots.values() for slot in by_layer.values()):
        return Html("")
    layers = range(stack.depth)
    step = max(1, round(stack.depth / 16))
    head = el("tr", el("th"), [el("th", str(n) if n % step == 0 else "") for n in layers])
    rows = []
    for tail, by_layer in slots.items():
        roles = " ".join(role.value for role in next(iter(by_layer.values())).roles)
        cells = []
        for n in layers:
            here = by_layer.get(n)
            on = here is not None and here.path in chosen
            hint = f"layer {n}, {tail}: {'adapted' if on else 'not adapted' if here else 'no such module'}"
            cells.append(el("td", "■" if on else "·" if here else "", cls="on" if on else "off", title=hint))
        rows.append(el("tr", el("th", roles or tail, cls="role", title=tail), cells))
    of = sum(slot.path in chosen for by_layer in slots.values() for slot in by_layer.values())
    return Html(
        el("div", el("table", head, rows, cls="map"), cls="wide")
        + el(
            "p",
            el("small", f"{stack.path}: {count(of)} modules adapted. Each column is a layer; ■ is adapted."),
        )
    )


def _epochs(runs: Sequence[Run]) -> Html:
    rows = []
    for run in runs:
        for epoch in run.report["epochs"]:
            mfu = epoch.get("mfu")
            rows.append(
                [
                    *([run.name] if len(runs) > 1 else []),
                    str(epoch["epoch"]),
                    f"{epoch['loss']:.3f}",
                    count(epoch["tokens"]),
                    seconds_text(epoch["seconds"]),
                    short(epoch["tokens_per_second"]),
                    f"{mfu:.0%}" if is_number(mfu) else "",
                    "cached" if epoch.get("replayed") else "run",
                ]
            )
    head = ["epoch", "loss", "tokens", "time", "tok/s", "matmul efficiency", "frozen layers"]
    return table((["run"] if len(runs) > 1 else []) + head, rows)


def _predicted(runs: Sequence[Run]) -> Html:
    """What was predicted, and what was measured."""
    rows: list[list[str]] = []
    for run in runs:
        report, guess = run.report, run.report.get("predicted")
        name = [run.name] if len(runs) > 1 else []
        if losses := report["eval"]:
            before, after = losses["before"]["loss"], losses["after"]["loss"]
            rows.append([*name, "held-out loss", "", f"{figures(before, 4)} → {figures(after, 4)}", ""])
        trained = count(report["trainable_params"])
        rows.append(
            [*name, "trainable parameters", count(guess["trainable_params"]) if guess else "", trained, ""]
        )
        if not guess:
            continue
        for what, text, before, after in (
            ("training steps", seconds_text, guess["seconds"], report["seconds"]),
            ("memory growth", bytes_text, guess["peak_memory_bytes"], report["memory_growth_bytes"]),
        ):
            rows.append([*name, what, text(before), text(after), deviation(before, after).strip(" ()")])
    head = [*(["run"] if len(runs) > 1 else []), "", "predicted", "actual", "difference"]
    return el(
        "section", el("h2", "Predicted and actual"), table(head, rows, 2 if len(runs) > 1 else 1)
    )  # fmt: skip


def _evaluated(report: EvalReport) -> list[Html]:
    parts: list[Html] = []
    if report.base is not None:
        about = f"{count(report.rows)} rows, {count(report.tokens)} target tokens{'; ± is the standard error' if report.paths else ''}."
        parts.append(
            el(
                "section",
                el("h2", "Base and adapter on the same rows" if report.paths else "The model on these rows"),
                el("p", about, cls="soft"),
                _scores(report.base, report.adapters),
            )
        )
    parts.append(_ranked(report.ranked))
    if report.groups:
        rows = []
        for group in report.groups:
            rows.append(
                [group.name, name_without(group.adapters), count(group.rows), f"{group.base.loss:.4f}", ""]
            )
            for a in group.adapters:
                rows.append(["", a.path, "", f"{a.loss:.4f}", f"{a.delta:+.4f} ± {a.stderr:.4f}"])
        parts.append(
            el(
                "section",
                el("h2", f"By {report.by}"),
                table([report.by, "model", "rows", "loss", "difference"], rows, 2),
            )
        )
    for group in report.also:
        parts.append(_also(group))
    for a in report.adapters:
        if a.best or a.worst:
            named = f": {a.path}" if len(report.adapters) > 1 else ""
            parts.append(
                el(
                    "section",
                    el("h2", f"Rows that changed the most{named}"),
                    [_row("improved" if row.adapter < row.base else "regressed", row) for row in a.best],
                    [
                        _row("smallest gain" if row.adapter < row.base else "regressed", row)
                        for row in a.worst
                    ],
                )
            )
    if report.benchmarks:
        rows = [
            [b.task, b.metric, b.model, f"{b.value:.4f}", "" if b.stderr is None else f"± {b.stderr:.4f}"]
            for b in report.benchmarks
        ]
        parts.append(
            el(
                "section",
                el("h2", "Benchmarks"),
                table(["task", "metric", "model", "value", "standard error"], rows, 3),
            )
        )
    if report.samples:
        parts.append(
            el(
                "section",
                el("h2", "Sample outputs"),
                [_sample(report, n) for n in range(len(report.samples))],
            )
        )
    return parts


def _ranked(ranked: Sequence[AdapterScore]) -> Html:
    """Several adapters from the lowest loss on, each against the first."""
    if not ranked:
        return Html("")
    rows = [[ranked[0].path, f"{ranked[0].loss:.4f}", "best", ""]]
    for a in ranked[1:]:
        interval = f"{a.low:+.4f} to {a.high:+.4f}"
        rows.append([a.path, f"{a.loss:.4f}", f"{a.delta:+.4f} ± {a.stderr:.4f}", interval])
    head = ["adapter", "loss", "to the best", "95 % CI"]
    return el("section", el("h2", "Adapters among each other"), table(head, rows))


def _scores(base: Score, adapters: Sequence[AdapterScore]) -> Html:
    rows = []
    for name, score in ((name_without(adapters), base), *((a.path, a) for a in adapters)):
        exact = "" if score.exact is None else f"{score.exact:.1%}"
        row = [name, f"{score.loss:.4f}", figures(score.perplexity), f"{score.accuracy:.1%}", exact]
        if isinstance(score, AdapterScore):
            row += [f"{score.delta:+.4f} ± {score.stderr:.4f}", f"{score.low:+.4f} to {score.high:+.4f}"]
        rows.append([*row, *[""] * (7 - len(row))])
    return table(["model", "loss", "perplexity", "accuracy", "exact match", "difference", "95 % CI"], rows)


def _also(group: Group) -> Html:
    about = f"{count(group.rows)} rows, {count(group.tokens)} tokens that the adapter should not change."
    return el(
        "section",
        el("h2", f"Also: {group.name}"),
        el("p", about, cls="soft"),
        _scores(group.base, group.adapters),
    )


def _row(label: str, row: RowChange) -> Html:
    head = f"{label}, {row.where}: loss {row.base:.3f} → {row.adapter:.3f} over {count(row.tokens)} tokens"
    return Html(el("p", head) + el("div", row.text, cls="said"))


def _sample(report: EvalReport, number: int) -> Html:
    sample = report.samples[number]
    texts = [("reference", sample.reference)] if sample.reference else []
    named = ["adapter"] if len(report.paths) == 1 else report.paths
    texts += [(name_without(report.paths), sample.base), *zip(named, sample.adapters, strict=True)]
    parts = [Html(el("dt", label) + el("dd", text or "(nothing)", cls="said")) for label, text in texts]
    return Html(el("p", el("strong", sample.prompt)) + el("dl", parts))


def _said(run: Run) -> Html:
    """What the model says to a held-out row, before and after training, where the run asked it."""
    said = run.report.get("sample")
    if not said:
        return Html("")
    parts = [
        Html(el("dt", label) + el("dd", str(said[label]) or "(nothing)", cls="said"))
        for label in ("reference", "before", "after")
        if said[label] or label != "reference"
    ]
    head = el("h2", f"A held-out row, before and after {run.name}")
    return el("section", head, el("p", el("strong", str(said["prompt"]))), el("dl", parts))


def _data(run: Run) -> Html:
    look = run.first("data")
    if not look:
        return Html("")
    names = ", ".join(f"{s['name']} ({s['format']})" for s in look["sources"])
    about = (
        f"{names}: {count(look['rows'])} rows, {count(look['tokens'])} tokens, "
        f"{percent(look['supervised_tokens'], look['tokens'])} of them in the loss (marked below); "
        f"{count(look['held_out_rows'])} rows held out."
    )
    at = look["lengths"]
    about += (
        f" Rows have {count(at['min'])} to {count(at['max'])} tokens, half of them up to {count(at['p50'])}."
    )
    found = DataReport.of({name: value for name, value in look.items() if name != "event"}).findings()
    notes = [*found, *(str(note["text"]) for note in run.every("note"))]
    rows = []
    for row in look["samples"]:
        pieces = [el("mark", text) if learned else el("span", text) for text, learned in row["pieces"]]
        rows.append(
            el("p", el("small", f"{row['where']}, {count(row['tokens'])} tokens"))
            + el("div", pieces, cls="said")
        )
    noted = el("ul", [el("li", note) for note in notes]) if notes else ""
    return el("section", el("h2", f"Data of {run.name}"), el("p", about), noted, [Html(row) for row in rows])


def _environment(run: Run) -> Html:
    """Date, device, versions and command line, where the run recorded them."""
    facts = facts_of(run)
    if not facts:
        return Html("")
    rows = [[str(name).replace("_", " "), str(value)] for name, value in facts.items() if value]
    return el("section", el("h2", f"Environment of {run.name}"), table(["", "value"], rows, 9))


def _settings(run: Run) -> Html:
    origin = run.settings.get("origin") or {}
    rows = [
        [name, "–" if value in (None, [], "") else str(value), str(origin.get(name, ""))]
        for name, value in run.settings.items()
        if name not in ("origin", "environment")
    ]
    return el(
        "details",
        el("summary", f"All settings of {run.name}"),
        table(["setting", "value", "from"], rows, 9),
    )
