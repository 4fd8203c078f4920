"""`lorafit compare`: what will be compared, progress, and the answer."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lorafit import __version__
from lorafit.compare import VERDICTS, Ahead, Answer, Began, ChoiceRow, Cut, Ended, Hint, Impossible
from lorafit.events import DataReport, Filling, Stepped
from lorafit.model import ModelMap
from lorafit.screen.console import Screen, Table, table_of
from lorafit.screen.data import show_data
from lorafit.units import bytes_text, count, index_ranges, layers_text, rows_text, seconds_text, short

FEW = 30  # held-out rows below which a note says that they are few
WIDE = 96  # columns from which on the table has all its columns


def show_impossible(screen: Screen, impossible: Sequence[Impossible]) -> None:
    """What the model cannot have, first."""
    for one in impossible:
        screen.line("left out", f"{one.choice}: {one.reason}")


def show_ahead(
    screen: Screen, found: ModelMap, ahead: Ahead, trainable: int | None, look: DataReport
) -> None:
    """How many candidates, how long, how much disk and memory."""
    screen.say(f"[bold]lorafit {__version__}[/]  {escape(found.model)}, {short(found.total_params)}")
    show_data(screen, ahead.candidates[0].config, look)
    choices = len({one.choice for one in ahead.candidates})
    seeds = len(ahead.candidates) // max(1, choices)
    text = f"{choices} candidate{'s' if choices > 1 else ''}"
    steps = sorted({cost.steps or 0 for cost in ahead.costs.values()})
    text += f" × {seeds} seeds" if seeds > 1 else ""
    many = count(steps[0]) if len(steps) == 1 else f"{count(steps[0])} to {count(steps[-1])}"
    config = ahead.candidates[0].config
    screen.line("compares", f"{text}, {many} steps of {rows_text(config.batch_size or 1)} each")
    if trainable is not None:
        sizes = [one.plan.trainable_params for one in ahead.candidates]
        screen.line(
            "sizes",
            f"{count(trainable)} trainable parameters wanted, {count(min(sizes))} to {count(max(sizes))} found",
        )
    if config.prefix_residency == "stream":
        residency = ahead.costs[ahead.lowest.name].prefix_residency
        below = layers_text(tuple(range(min(layer for _, layer in ahead.lowest.cut))))
        screen.line(
            "streams", f"{below}: read as they run, {bytes_text(residency.bytes_read)} in all, and not held"
        )
    screen.line(
        "predicted",
        f"about {seconds_text(ahead.total)}, peak memory {bytes_text(ahead.peak)}, {bytes_text(ahead.disk)} on disk",
    )
    for text in (*ahead.notes, *look.findings()):
        screen.line("note", text, most=0 if screen.verbose else 2)
    if look.held_out_rows < FEW:
        screen.note(
            f"only {rows_text(look.held_out_rows)} held out: that tells few candidates apart; --holdout 0.3, or --eval-data FILE"
        )


def show_candidates(screen: Screen, ahead: Ahead) -> None:
    """What each candidate will cost."""
    table = table_of("candidate", "layers", "rank", "trainable", "steps", "peak", "time", right=6, fold=0)
    for one in ahead.candidates:
        cost = ahead.costs[one.name]
        table.add_row(
            f"  {escape(one.name)}",
            "; ".join(index_ranges(layers) for layers in one.plan.layers.values()),
            str(one.plan.lora.r),
            short(one.plan.trainable_params),
            count(cost.steps or 0),
            bytes_text(cost.memory.peak),
            seconds_text(ahead.seconds[one.name]),
        )
    screen.answer()
    screen.answer(table)


class CompareView:
    """Progress of a comparison: a bar on a terminal, and a line for each candidate."""

    def __init__(self, screen: Screen, ahead: Ahead) -> None:
        self.screen, self.ahead = screen, ahead
        self.progress: Progress | None = None
        self.task: Any = None
        self.began = Began("", 0, len(ahead.candidates))
        self.started: dict[str, float] = {}
        self.ended = 0
        self.width = max(len(one.name) for one in ahead.candidates)

    def on(self, event: Any) -> None:
        match event:
            case Filling() if event.done == event.tokens:
                self.screen.line(
                    "cache", f"frozen layers of all candidates run once, in {seconds_text(event.seconds)}"
                ) if not self.began.name else None
            case Hint():
                self._hint(event)
            case Began():
                self._begin(event)
            case Stepped() if self.progress is not None and self.ahead.workers == 1:
                self.progress.update(self.task, completed=event.step)
            case Ended():
                self._end(event)
            case Cut():
                self._cut(event)

    def _begin(self, event: Began) -> None:
        self.close()
        if event.number > 1 and not self.started and self.ahead.workers == 1:
            self.screen.line("resumes", f"{event.number - 1} of {event.of} are done")
        self.began, self.started[event.name] = event, time.perf_counter()
        if not self.screen.live or self.ahead.workers > 1:
            return
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            console=self.screen.talk,
            transient=True,
        )
        self.progress.start()
        text = f"{event.number} of {event.of}  {event.name}"
        self.task = self.progress.add_task(text, total=self.ahead.costs[event.name].steps or 1)

    def _end(self, event: Ended) -> None:
        self.close()
        self.ended += 1
        one, width = event.outcome, len(str(self.began.of))
        number = self.began.number if self.ahead.workers == 1 else self.ended
        at = f"{number:>{width}}/{self.began.of}"
        if event.loss is None:
            self.screen.line(at, f"{one.name:<{self.width}}  failed: {one.reason}")
            return
        took = seconds_text(time.perf_counter() - self.started[one.name])
        until = f", after step {count(one.step)} of {count(one.steps)}" if one.status != "finished" else ""
        self.screen.line(
            at,
            f"{one.name:<{self.width}}  held-out loss {event.loss:.4f} ({event.loss - event.base_loss:+.4f}), {took}{until}",
        )

    def _hint(self, hint: Hint) -> None:
        """Roles × layers, as digits: 9 is the strongest signal."""
        strongest = max(cell or 0.0 for cells in hint.signals.values() for cell in cells) or 1.0
        digits = {
            role: "".join("·" if cell is None else str(min(9, int(10 * cell / strongest))) for cell in cells)
            for role, cells in hint.signals.items()
        }
        for number, (role, text) in enumerate(digits.items()):
            self.screen.line("" if number else "hint", f"{role:<5}{text}")
        self.screen.line(
            "", "gradient of an adapter at its start, by role, from layer 0 on; 9 is the strongest"
        )
        self.screen.line("", f"it suggests {hint.suggested}: a hint, not a measurement")

    def _cut(self, event: Cut) -> None:
        if event.dropped:
            self.screen.line("dropped", f"after {event.share:.0%} of the steps: {', '.join(event.dropped)}")

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def show_answer(screen: Screen, answer: Answer) -> None:
    """The answer in words, then the table, and what to do next."""
    screen.say()
    for text in answer.words:
        screen.answer(escape(text))
    screen.answer()
    if answer.choices:
        screen.answer(
            f"{rows_text(answer.rows)} held out, {count(answer.tokens)} supervised tokens; base loss {answer.base_loss:.4f}"
        )
        screen.answer()
        screen.answer(_table(screen, answer.choices))
        screen.answer()
        if answer.choices[0].also:
            screen.answer(_forgetting(answer.choices))
            screen.answer()
        fast = ", ".join(c.choice for c in answer.choices if c.fast)
        small = ", ".join(c.choice for c in answer.choices if c.small)
        screen.line("Pareto", f"no other is better in loss and time: {fast}", answer=True)
        screen.line("", f"no other is better in loss and parameters: {small}", answer=True)
    if answer.hint is not None:
        said = f"suggested {answer.hint.suggested}"
        if answer.hint_correlation is not None:
            said += f"; its ranking agrees with the measured one to {answer.hint_correlation:+.2f} (Spearman)"
        screen.line("hint", said, answer=True)
    for name, reason in answer.missing:
        label = "dropped" if reason.startswith("dropped") else "failed"
        screen.line(label, f"{name}: {reason.removeprefix('dropped ')}", answer=True)
    for note in answer.notes:
        screen.note(note, answer=True)
    screen.line("page", f"{answer.folder}/compare.html", answer=True)
    best = next((c.runs[0] for c in answer.choices if c.choice == answer.take), None)
    if best is not None:
        screen.command("next", shlex.join(["lorafit", "eval", f"{answer.folder}/{best}"]))
    if answer.command:
        screen.command("in full", answer.command)


def _table(screen: Screen, choices: Sequence[ChoiceRow]) -> Table:
    """One line per choice, the lowest loss first."""
    several = any(c.spread is not None for c in choices)
    wide = screen.out.width >= WIDE
    columns = ["choice", "loss", *(["seeds ±"] if several else []), "to the lowest", "", "trainable", "time"]
    columns += ["tok/s", "memory", "adapter"] if wide else []
    table = table_of(*columns, right=len(columns) - 1, fold=0)
    for c in choices:
        cells = [f"{c.loss:.4f}"]
        if several:
            cells.append("" if c.spread is None else f"{c.spread:.4f}")
        cells += [
            "" if c is choices[0] else f"{c.delta:+.4f} ± {c.error:.4f}",
            VERDICTS.get(c.verdict, c.verdict),
        ]
        cells += [short(c.trainable_params), seconds_text(c.seconds)]
        if wide:
            cells += [short(c.tokens_per_second), bytes_text(c.growth), bytes_text(c.adapter_bytes)]
        table.add_row(f"  {escape(c.choice)}", *cells)
    return table


def _forgetting(choices: Sequence[ChoiceRow]) -> Table:
    """What became of the texts that should not change."""
    files = [each.file for each in choices[0].also]
    table = table_of("choice", *files, right=len(files), fold=0)
    for c in choices:
        table.add_row(f"  {escape(c.choice)}", *(f"{each.delta:+.4f} ± {each.stderr:.4f}" for each in c.also))
    return table
