"""`lorafit eval`: base and adapters over the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape

from lorafit.model import called, hub_name
from lorafit.report import name_without
from lorafit.results import AdapterScore, EvalReport, Group, Score
from lorafit.screen.console import LABEL, Screen, Table, clip, table_of
from lorafit.units import count, figures, rows_text


def show_eval(screen: Screen, report: EvalReport) -> None:
    """Base and adapters over the same rows, the rows that changed the most, and sample outputs."""
    named = _short_names(report.paths)
    if report.base is not None:
        screen.answer(f"{count(report.rows)} rows, {count(report.tokens)} supervised tokens")
        screen.answer()
        screen.answer(_scores_table(report.base, report.adapters, named, exact=report.exact_rows > 0))
        screen.answer()
        for a, name in zip(report.adapters, named, strict=True):
            _say(screen, name, _significance(a, report.rows))
        if report.ranked:
            screen.answer()
            screen.answer(_ranking(report.ranked, dict(zip(report.paths, named, strict=True)), report.rows))
            screen.answer()
        if report.exact_rows:
            of = "all rows" if report.exact_rows == report.rows else rows_text(report.exact_rows)
            screen.line(
                "exact", f"exact match with greedy decoding, over {of} with one short answer", answer=True
            )
    if report.groups:
        screen.answer()
        screen.answer(_groups_table(report.by, report.groups, named))
    for group in report.also:
        screen.answer()
        screen.line(
            "also", f"{group.name}: {rows_text(group.rows)}, {count(group.tokens)} tokens", answer=True
        )
        screen.answer()
        screen.answer(_scores_table(group.base, group.adapters, named, exact=False))
        screen.answer()
        for a, name in zip(group.adapters, named, strict=True):
            _say(screen, name, _significance(a, group.rows))
    if report.benchmarks:
        screen.answer()
        screen.answer(_benchmarks_table(report, named))
    for a, name in zip(report.adapters, named, strict=bool(report.adapters)):
        for most, rows in ((True, a.best), (False, a.worst)):
            for row in rows:
                improved = row.adapter < row.base
                owner = f", {name}" if len(named) > 1 else ""
                screen.answer()
                screen.line(
                    change_label(improved, most),
                    f"{row.where}: loss {row.base:.3f} → {row.adapter:.3f} over {count(row.tokens)} tokens{owner}",
                    answer=True,
                )
                screen.line("", clip(row.text, 200), answer=True)
    for number, sample in enumerate(report.samples, 1):
        screen.answer()
        screen.line(f"sample {number}", clip(sample.prompt), answer=True)
        reference = [("reference", sample.reference)] if sample.reference else []
        for label, text in (
            *reference,
            (name_without(report.paths), sample.base),
            *zip(named, sample.adapters, strict=True),
        ):
            _say(screen, label, clip(text) or "(nothing)")
    if report.page:
        screen.answer()
        screen.command("page", report.page)
    for note in report.notes:
        screen.note(note, answer=True)


def change_label(improved: bool, most: bool) -> str:
    """What became of a row: `most` is for those at the better end of the list."""
    return "regressed" if not improved else "improved" if most else "least gain"


def _short_names(paths: Sequence[str]) -> list[str]:
    """What the adapters are called, in tables and text alike: by their folder where that tells them apart."""
    if len(paths) == 1:
        return ["adapter"]
    names = [called(path) for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _say(screen: Screen, name: str, text: str) -> None:
    """A line about a model, with its name at the head where there is room for it."""
    if len(name) < LABEL:
        screen.line(name, text, answer=True)
    else:
        screen.line("", f"{name}: {text}", answer=True)


def _ranking(ranked: Sequence[AdapterScore], named: Mapping[str, str], rows: int) -> Table:
    """The adapters from the lowest loss on, each against the best."""
    table = table_of("ranked", "loss", "to the best", "95 % CI", "", right=4, fold=0)
    for number, a in enumerate(ranked):
        name = f"  {escape(named[a.path])}"
        if number == 0:
            table.add_row(name, f"{a.loss:.4f}", "", "", "best")
            continue
        verdict = "" if rows < 2 else "same" if a.low <= 0 <= a.high else "worse"
        interval = f"{a.low:+.4f} to {a.high:+.4f}" if rows > 1 else ""
        table.add_row(name, f"{a.loss:.4f}", f"{a.delta:+.4f} ± {a.stderr:.4f}", interval, verdict)
    return table


def _scores_table(base: Score, adapters: Sequence[AdapterScore], named: Sequence[str], exact: bool) -> Table:
    """One line per model."""
    columns = ["model", "loss", "perplexity", "accuracy", *(["exact"] if exact else [])]
    columns += ["difference"] if adapters else []
    table = table_of(*columns, right=len(columns) - 1, fold=0)
    alone = [hub_name(Path(a.path)) or a.path for a in adapters]
    labels = named if len(adapters) > 1 else alone
    for label, score in ((name_without(adapters), base), *zip(labels, adapters, strict=True)):
        values = [f"{score.loss:.4f}", figures(score.perplexity), f"{score.accuracy:.1%}"]
        if exact:
            values.append("" if score.exact is None else f"{score.exact:.1%}")
        differs = f"{score.delta:+.4f} ± {score.stderr:.4f}" if isinstance(score, AdapterScore) else ""
        table.add_row(f"  {escape(label)}", *values, *([differs] if adapters else []))
    return table


def _significance(score: AdapterScore, rows: int) -> str:
    """The difference in words, with its 95 % confidence interval from that many rows."""
    if rows < 2:
        return "one row is too few for a confidence interval"
    interval = f"(95 % CI {score.low:+.4f} to {score.high:+.4f})"
    if score.low <= 0 <= score.high:
        return f"no significant difference on these rows {interval}"
    return f"{'better' if score.high < 0 else 'worse'} than the base {interval}"


def _benchmarks_table(report: EvalReport, named: Sequence[str]) -> Table:
    """One line per task, metric and model."""
    names = {"base": name_without(report.paths), **dict(zip(report.paths, named, strict=True))}
    table = table_of("task", "metric", "model", "value", "", right=2, fold=0)
    for b in report.benchmarks:
        error = "" if b.stderr is None else f"± {b.stderr:.4f}"
        cells = (f"  {escape(b.task)}", escape(b.metric), escape(names[b.model]))
        table.add_row(*cells, f"{b.value:.4f}", error)
    return table


def _groups_table(by: str, groups: Sequence[Group], named: Sequence[str]) -> Table:
    """One line per group and adapter."""
    table = table_of(by, "rows", "tokens", "model", "loss", "accuracy", "difference", right=3, fold=0)
    for group in groups:
        base = group.base
        sizes = (count(group.rows), count(group.tokens))
        table.add_row(
            f"  {escape(clip(group.name, 40)) or '(empty)'}",
            *sizes,
            name_without(group.adapters),
            f"{base.loss:.4f}",
            f"{base.accuracy:.1%}",
            "",
        )
        for a, name in zip(group.adapters, named, strict=True):
            table.add_row(
                "",
                "",
                "",
                escape(name),
                f"{a.loss:.4f}",
                f"{a.accuracy:.1%}",
                f"{a.delta:+.4f} ± {a.stderr:.4f}",
            )
    return table
