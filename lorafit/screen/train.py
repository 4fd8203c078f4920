"""`lorafit train`: progress while it runs, and the result."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lorafit.events import (
    Compiling,
    DataReport,
    EpochDone,
    Evaluated,
    Event,
    Filling,
    Loss,
    Note,
    Predicted,
    PrefixCache,
    Saved,
    Started,
    Stepped,
    TrainReport,
)
from lorafit.outputs import PAGE
from lorafit.screen.console import LABEL, Screen, clip, show_uses
from lorafit.units import bytes_text, compared, count, epochs_text, figures, rows_text, seconds_text, short

if TYPE_CHECKING:
    from lorafit.report import Use

BAR, SHORTEST_BAR = 12, 5  # columns of the bar
EPOCH_WIDTH = 76  # columns of a line of the epochs' table
PRELUDE = 15  # lines before the first step, at most
NOTE_LINES = 2  # of a note among them


class TrainView:
    """Progress of a run: a live bar on a terminal; elsewhere a line at each evaluation, and otherwise one every
    `every` seconds at most."""

    def __init__(self, screen: Screen, every: float = 30.0) -> None:
        self.screen = screen
        self.every = every
        self.progress: Progress | None = None
        self.task: Any = None
        self.settings: Mapping[str, Any] = {}
        self.epochs = 1.0
        self.held_out = True
        self.loss = 0.0
        self.parts: dict[str, int] = {}  # of the bar's line, with their columns
        self.recent: list[Stepped] = []
        self.marks: list[float] = []  # when the last steps ended
        self.shown_at = time.monotonic()
        self.notes: list[str] = []  # of the prelude, shown at its end
        self.before = True  # the prelude goes on
        self.headed = False  # the head of the epochs' table is printed
        self.mixed = False  # lines stand between those of the epochs

    def start(self, run: Started, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def on(self, event: Event) -> None:
        match event:
            case Started():
                self._started(event)
            case DataReport():
                self.notes += event.findings()
            case Predicted():
                self.screen.line(
                    "predicted",
                    f"about {seconds_text(event.seconds)} in training steps, "
                    f"peak memory {bytes_text(event.peak_memory_bytes)}{f' ({event.busy})' if event.busy else ''}",
                )
            case Note() if self.before:
                self.notes.append(event.text)
            case Note():
                self.screen.note(event.text)
            case PrefixCache():
                self.screen.line("cache", _cache_text(event))
                if self.before:
                    self._show_notes()
                    if not self.held_out:
                        self._open()
            case Filling():
                self._filling(event)
            case Compiling(done=False) if self.screen.live:
                self._show(TextColumn(f"compiling {event.blocks} blocks"), SpinnerColumn())
            case Compiling(done=True):
                self.close()
                self.screen.line("compiled", _compiled_text(event))
            case Evaluated(step=0):
                loss = Loss(event.loss, event.tokens)
                self.screen.line(
                    "before", f"held-out loss {event.loss:.3f}, perplexity {figures(loss.perplexity)}"
                )
                self._open()
            case Evaluated() if event.step < self.steps:  # that of the end is in the report
                self._evaluated(event)
            case Stepped():
                self._stepped(event)
            case EpochDone() if not self.screen.quiet:
                self._epoch(event)
            case Saved() if not event.best:  # that of the best is shown as it is evaluated
                self.screen.command("saved", event.path, answer=False)
            case TrainReport():
                self.close()
            case _:
                pass

    def _started(self, event: Started) -> None:
        self.epochs, self.steps, self.at = event.epochs, event.steps, event.resumed_at
        self.held_out = event.held_out_rows > 0
        plan = f"{epochs_text(event.epochs)}, {count(event.steps)} step{'s' if event.steps > 1 else ''}"
        if self.settings:
            parts = self.settings["accumulate"]
            rows = min(self.settings["batch_size"], event.rows)
            plan += f" of {rows_text(rows)}{f' × {parts}' if parts > 1 else ''}"
            plan += (
                f", learning rate {figures(self.settings['learning_rate'], 2)} ({self.settings['scheduler']})"
            )
            if "rank" in self.settings:
                plan += f", rank {self.settings['rank']}, alpha {self.settings['alpha']:g}"
        if event.resumed_at:
            plan += f", continued from step {count(event.resumed_at)}"
        if event.processes > 1:
            plan += f", in {event.processes} processes{' that share the base' if event.sharded else ''}"
        self.screen.line("plan", plan)
        self.notes += (f"skipped damaged checkpoint: {text}" for text in event.damaged)

    def _show_notes(self) -> None:
        """The notes in short, as many as there is room for in a prelude of PRELUDE lines; all with --verbose."""
        self.before, screen, left, cut = False, self.screen, list(self.notes), False
        most = 0 if screen.verbose else NOTE_LINES
        room = PRELUDE - 2  # a line on the rest, and one on the loss before
        while left and (screen.verbose or screen.said + min(most, screen.lines_of(left[0])) <= room):
            text = left.pop(0)
            cut = cut or 0 < most < screen.lines_of(text)
            screen.line("note", text, most=most)
        if left or cut:
            more = f"{count(len(left))} more; " if left else ""
            screen.line("", f"{more}--verbose and the report show all notes in full")

    def _filling(self, event: Filling) -> None:
        """How far the layers below the cut are: a bar, or a line now and then."""
        speed = f"{short(event.done / max(1e-9, event.seconds))} tok/s"
        if event.done == event.tokens:
            self.close()
            read = f", {bytes_text(event.bytes_read)} of weights read" if event.bytes_read else ""
            done = f"{count(event.tokens)} tokens in {seconds_text(event.seconds)}, {speed}"
            self.screen.line("cached", done + read)
        elif self.screen.live:
            if self.progress is None:
                columns = (
                    TextColumn("frozen layers"),
                    BarColumn(bar_width=12),
                    TextColumn("{task.fields[now]}"),
                    TimeRemainingColumn(compact=True),
                )
                self._show(*columns, total=event.tokens, now="")
            assert self.progress is not None
            self.progress.update(self.task, completed=event.done, now=speed)
        elif time.monotonic() - self.shown_at >= self.every:
            left = event.seconds * (event.tokens / max(1, event.done) - 1)
            done = f"{count(event.done)} of {count(event.tokens)} tokens"
            self.screen.line("caching", f"{done}, {speed}, {seconds_text(left)} left")
            self.shown_at = time.monotonic()

    def _show(self, *columns: ProgressColumn, **fields: Any) -> None:
        """A live bar of these columns."""
        self.progress = Progress(TextColumn(" "), *columns, console=self.screen.talk, transient=True)
        self.progress.start()
        self.task = self.progress.add_task("", **fields)

    def _open(self) -> None:
        self.shown_at = time.monotonic()
        self.screen.say()
        if not self.screen.live:
            return
        self.parts = bar_parts(self.screen.talk.width, self.steps, ceil(self.epochs))
        columns: dict[str, ProgressColumn] = {
            "epoch": TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            "bar": BarColumn(bar_width=self.parts.get("bar")),
            "count": MofNCompleteColumn(),
            "loss": TextColumn("{task.fields[now]}"),
            "left": TimeRemainingColumn(compact=True),
        }
        shown = [column for name, column in columns.items() if name in self.parts]
        fields = {"epoch": 1, "epochs": ceil(self.epochs), "now": ""}
        self._show(*shown, total=self.steps, completed=self.at, **fields)

    def _stepped(self, event: Stepped) -> None:
        self.loss = event.loss if not self.loss else 0.9 * self.loss + 0.1 * event.loss
        self.recent = [*self.recent[-19:], event]
        self.marks = [*self.marks[-49:], time.monotonic()]
        if self.progress is not None:
            target = short(self._rate(sum(e.supervised_tokens for e in self.recent)))
            now = f"loss {self.loss:.3f}"
            now += f"  {self._speed()}" if "speed" in self.parts else ""
            now += f", {target} target tok/s" if "target" in self.parts else ""
            self.progress.update(self.task, completed=event.step, epoch=event.epoch, now=now)
        elif self.marks[-1] - self.shown_at >= self.every and event.step < self.steps:
            self._progress_line()

    def _evaluated(self, event: Evaluated) -> None:
        if self.progress is not None or not self.recent:
            best = ", the best so far" if event.best else ""
            self.screen.line("held out", f"step {event.step}: loss {event.loss:.3f}{best}")
        else:
            self._progress_line(f", held out {event.loss:.3f}{' (best)' if event.best else ''}")

    def _progress_line(self, held_out: str = "") -> None:
        """Where the run is, as a line for a log."""
        last, left = self.recent[-1], self.steps - self.recent[-1].step
        took = (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1) if self.marks[1:] else last.seconds
        self.screen.line(
            "step",
            f"{count(last.step)} of {count(self.steps)}: loss {self.loss:.3f}{held_out}, "
            f"rate {figures(last.learning_rate, 2)}, {self._speed()}, {seconds_text(left * took)} left",
        )
        self.shown_at, self.mixed = time.monotonic(), True

    def _speed(self) -> str:
        return f"{short(self._rate(sum(e.tokens for e in self.recent)))} tok/s"

    def _rate(self, tokens: int) -> float:
        return tokens / max(1e-9, sum(e.seconds for e in self.recent))

    def _epoch(self, event: EpochDone) -> None:
        speed, target = (
            short(event.tokens_per_second),
            short(event.supervised_tokens / max(1e-9, event.seconds)),
        )
        share = f"{event.mfu:.0%}" if event.mfu is not None else "–"
        frozen = "cached" if event.replayed else "run"
        if self.screen.talk.width < EPOCH_WIDTH or self.mixed:
            self.screen.line(
                f"epoch {event.epoch}",
                f"loss {event.loss:.3f}, {speed} tok/s, {target} target tok/s, "
                f"matmul efficiency {share}, frozen layers {frozen}",
            )
            return
        if not self.headed:
            self.headed = True
            self.screen.say(
                f"  {'epoch':<{LABEL}}{'loss':>5}{'tok/s':>9}{'target tok/s':>14}{'matmul efficiency':>19}"
                f"{'frozen layers':>15}"
            )
        self.screen.say(
            f"  {event.epoch:<{LABEL}}{event.loss:>5.3f}{speed:>9}{target:>14}{share:>19}{frozen:>15}"
        )

    def close(self, failed: bool = False) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def bar_parts(width: int, steps: int, epochs: int) -> dict[str, int]:
    """The parts of the progress line that fit in the terminal's width, and the columns of each. Parts are left out
    before a figure is cut; the bar takes the remaining columns."""
    wide = {
        "count": 2 * len(str(steps)) + 1,
        "loss": len("loss 0.000"),
        "left": len("1:00:00"),
        "epoch": len(f"epoch {epochs}/{epochs}"),
        "speed": len("  1.23 M tok/s") - 1,  # in the column of the loss
        "target": len(", 1.23 M target tok/s") - 1,
    }
    room, shown = width - 2, dict[str, int]()
    for name, columns in wide.items():
        if room < columns + 1:
            return shown
        room -= columns + 1
        shown[name] = columns
    return shown if room <= SHORTEST_BAR else {**shown, "bar": min(BAR, room - 1)}


def _cache_text(event: PrefixCache) -> str:
    if event.where == "off":
        return f"frozen-layer cache off: {event.reason}"
    several = event.layers > 1
    layers = f"layers 0–{event.layers - 1}" if several else "layer 0"
    if event.streamed:
        layers += " are read from disk as they" if several else " is read from disk as it"
    layers += " run" if several else " runs"
    return (
        f"{layers} once per row; every epoch reads the result from {event.where} "
        f"({bytes_text(event.bytes)}; {event.reason})"
    )


def _compiled_text(event: Compiling) -> str:
    blocks = "1 adapted block" if event.blocks == 1 else f"{event.blocks} adapted blocks"
    return f"{blocks} in {seconds_text(event.seconds)}; gradient off by {event.off:.1e} of its length"


def show_train_report(screen: Screen, report: TrainReport, uses: Sequence[Use] = ()) -> None:
    """The result of the run, the next commands, and the lines for other tools."""
    if report.eval:
        before, after = report.eval["before"], report.eval["after"]
        screen.line(
            "after",
            f"held-out loss {after.loss:.3f} ({after.loss - before.loss:+.3f}), perplexity {figures(after.perplexity)}",
            answer=True,
        )
    guess = report.predicted
    time_off = compared(guess.seconds, report.seconds) if guess else ""
    memory_off = compared(guess.peak_memory_bytes, report.memory_growth_bytes) if guess else ""
    screen.line(
        "measured",
        f"{seconds_text(report.seconds)} in training steps{time_off}, {short(report.tokens_per_second)} tok/s; "
        f"memory grew by {bytes_text(report.memory_growth_bytes)}{memory_off} to {bytes_text(report.peak_memory_bytes)}",
        answer=True,
    )
    step = f"step {count(report.adapter_step)}"
    if (last := report.eval.get("last")) is not None:
        step += f", the best of {count(report.steps)}"
        screen.line(
            "last", f"held-out loss {last.loss:.3f} after step {count(report.steps)}: not saved", answer=True
        )
    elif report.best is not None:
        screen.line(
            "best",
            f"held-out loss {report.best.loss:.3f} after step {report.best.step}: "
            f"{report.output}/checkpoint-{report.best.step}",
            answer=True,
        )
    if (said := report.sample) is not None:
        wanted = [("reference", said.reference)] if said.reference else []
        texts = (("before", said.before), ("after", said.after))
        for label, text in (("sample", said.prompt), *wanted, *texts):
            screen.line(label, clip(text, 240) or "(nothing)", answer=True)
    screen.command("saved", f"{report.output} ({step})")
    screen.command("page", f"{report.output}/{PAGE}")
    name = PurePath(report.output).name
    commands = [["eval", report.output, *([] if report.eval else ["--data", "FILE"])]]
    commands += [["chat", report.output]] if report.task != "masked" else []
    commands += [["merge", report.output, "-o", f"{name}-merged"]]
    screen.commands("next", (shlex.join(["lorafit", *command]) for command in commands))
    show_uses(screen, uses)
