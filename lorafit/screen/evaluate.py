"""`lorafit eval`: base and adapters over the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape

from lorafit.results import AdapterScore, EvalReport, Group, Score
from lorafit.screen.console import Screen, Table, clip, table_of
from lorafit.units import count, figures, rows_text


def show_eval(screen: Screen, report: EvalReport) -> None:
    """Base and adapters over the same rows, the rows that changed the most, and sample outputs."""
    named = _short_names(report.paths)
    if report.base is not None:
        screen.answer(f"{count(report.rows)} rows, {count(report.tokens)} supervised tokens")
        screen.answer()
        screen.answer(_scores_table(report.base, report.adapters, exact=report.exact_rows > 0))
        screen.answer()
        for a, name in zip(report.adapters, named, strict=True):
            screen.line(name, _significance(a, report.rows), answer=True)
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
        screen.answer(_scores_table(group.base, group.adapters, exact=False))
        screen.answer()
        for a, name in zip(group.adapters, named, strict=True):
            screen.line(name, _significance(a, group.rows), answer=True)
    if report.benchmarks:
        names = {"base": "base", **dict(zip(report.paths, named, strict=True))}
        table = table_of("task", "metric", "model", "value", "", right=2, fold=0)
        for b in report.benchmarks:
            error = "" if b.stderr is None else f"± {b.stderr:.4f}"
            table.add_row(f"  {escape(b.task)}", escape(b.metric), names[b.model], f"{b.value:.4f}", error)
        screen.answer()
        screen.answer(table)
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
        for label, text in (*reference, ("base", sample.base), *zip(named, sample.adapters, strict=True)):
            screen.line(label, clip(text) or "(nothing)", answer=True)
    if report.page:
        screen.answer()
        screen.line("page", report.page, answer=True)
    for note in report.notes:
        screen.note(note, answer=True)


def change_label(improved: bool, most: bool) -> str:
    """What became of a row: `most` is for those at the better end of the list."""
    return "regressed" if not improved else "improved" if most else "least gain"


def _short_names(paths: Sequence[str]) -> list[str]:
    """The labels of the adapters in the margin: numbered where there are several."""
    return ["adapter"] if len(paths) == 1 else [f"adapter {n}" for n in range(1, len(paths) + 1)]


def _scores_table(base: Score, adapters: Sequence[AdapterScore], exact: bool) -> Table:
    """One line per model."""
    columns = ["model", "loss", "perplexity", "accuracy", *(["exact"] if exact else []), "difference"]
    table = table_of(*columns, right=len(columns) - 1, fold=0)
    for label, score in (("base", base), *((a.path, a) for a in adapters)):
        values = [f"{score.loss:.4f}", figures(score.perplexity), f"{score.accuracy:.1%}"]
        if exact:
            values.append("" if score.exact is None else f"{score.exact:.1%}")
        differs = f"{score.delta:+.4f} ± {score.stderr:.4f}" if isinstance(score, AdapterScore) else ""
        table.add_row(f"  {escape(label)}", *values, differs)
    return table


def _significance(score: AdapterScore, rows: int) -> str:
    """The difference in words, with its 95 % confidence interval from that many rows."""
    if rows < 2:
        return "one row is too few for a confidence interval"
    interval = f"(95 % CI {score.low:+.4f} to {score.high:+.4f})"
    if score.low <= 0 <= score.high:
        return f"no significant difference on these rows {interval}"
    return f"{'better' if score.high < 0 else 'worse'} than the base {interval}"


def _groups_table(by: str, groups: Sequence[Group], named: Sequence[str]) -> Table:
    """One line per group and adapter."""
    table = table_of(by, "rows", "tokens", "model", "loss", "accuracy", "difference", right=3, fold=0)
    for group in groups:
        base = group.base
        sizes = (count(group.rows), count(group.tokens))
        table.add_row(
            f"  {escape(clip(group.name, 40)) or '(empty)'}",
            *sizes,
            "base",
            f"{base.loss:.4f}",
            f"{base.accuracy:.1%}",
            "",
        )
        for a, name in zip(group.adapters, named, strict=True):
            table.add_row(
                "", "", "", name, f"{a.loss:.4f}", f"{a.accuracy:.1%}", f"{a.delta:+.4f} ± {a.stderr:.4f}"
            )
    return table
