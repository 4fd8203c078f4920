"""`lorafit train`: progress while it runs, and the result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorafit.events import (
    EpochDone,
    Evaluated,
    Event,
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
from lorafit.screen.console import LABEL, Screen
from lorafit.units import bytes_text, count, deviation, figures, seconds_text, short

EPOCH_WIDTH = 76  # columns of a line of the epochs' table


class TrainView:
    """Progress of a run: a live bar on a terminal, one line per epoch elsewhere."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.live = not screen.quiet and screen.talk.is_terminal
        self.progress: Progress | None = None
        self.task: Any = None
        self.epochs = 1
        self.loss = 0.0
        self.recent: list[Stepped] = []
        self.headed = False  # the head of the epochs' table is printed

    def start(self, run: Started, settings: Mapping[str, Any]) -> None:
        """`Started` is shown as an event."""

    def on(self, event: Event) -> None:
        match event:
            case Started():
                self._started(event)
            case Predicted():
                self.screen.line(
                    "predicted",
                    f"about {seconds_text(event.seconds)} in training steps, "
                    f"peak memory {bytes_text(event.peak_memory_bytes)}",
                )
            case Note():
                self.screen.note(event.text)
            case PrefixCache():
                self.screen.line("cache", _cache_text(event))
            case Evaluated(step=0):
                loss = Loss(event.loss, event.tokens)
                self.screen.line(
                    "before", f"held-out loss {event.loss:.3f}, perplexity {figures(loss.perplexity)}"
                )
                self._open()
            case Evaluated() if self.progress is not None:
                self.screen.line("held out", f"step {event.step}: loss {event.loss:.3f}")
            case Stepped():
                self._stepped(event)
            case EpochDone() if not self.screen.quiet:
                self._epoch(event)
            case Saved():
                self.screen.line("saved", f"{event.path}{', the best so far' if event.best else ''}")
            case TrainReport():
                self.close()
            case _:
                pass

    def _started(self, event: Started) -> None:
        self.epochs, self.steps, self.at = event.epochs, event.steps, event.resumed_at
        plan = f"{event.epochs} epoch{'s' if event.epochs > 1 else ''}, {count(event.steps)} steps"
        if event.resumed_at:
            plan += f", continued from step {count(event.resumed_at)}"
        if event.processes > 1:
            plan += f", in {event.processes} processes"
        self.screen.line("plan", plan)
        for text in event.damaged:
            self.screen.note(f"skipped damaged checkpoint: {text}")

    def _open(self) -> None:
        self.screen.say()
        if not self.live:
            return
        self.progress = Progress(
            TextColumn("  epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=self.screen.talk,
            transient=True,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            "", total=self.steps, completed=self.at, epoch=1, epochs=self.epochs, loss=0.0, speed="–"
        )

    def _stepped(self, event: Stepped) -> None:
        self.loss = event.loss if not self.loss else 0.9 * self.loss + 0.1 * event.loss
        self.recent = [*self.recent[-19:], event]
        if self.progress is not None:
            seconds = max(1e-9, sum(e.seconds for e in self.recent))
            speed = short(sum(e.tokens for e in self.recent) / seconds)
            target = short(sum(e.supervised_tokens for e in self.recent) / seconds)
            speed = f"{speed} tok/s, {target} target tok/s"
            self.progress.update(
                self.task, completed=event.step, epoch=event.epoch, loss=self.loss, speed=speed
            )

    def _epoch(self, event: EpochDone) -> None:
        speed, target = (
            short(event.tokens_per_second),
            short(event.supervised_tokens / max(1e-9, event.seconds)),
        )
        share = f"{event.mfu:.0%}" if event.mfu is not None else "–"
        frozen = "cached" if event.replayed else "run"
        if self.screen.talk.width < EPOCH_WIDTH:
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


def _cache_text(event: PrefixCache) -> str:
    if event.where == "off":
        return f"frozen-layer cache off: {event.reason}"
    layers = f"layers 0–{event.layers - 1} run" if event.layers > 1 else "layer 0 runs"
    return (
        f"{layers} once per row; later epochs read the result from {event.where} "
        f"({bytes_text(event.bytes)}; {event.reason})"
    )


def show_train_report(screen: Screen, report: TrainReport) -> None:
    """The result of the run, and the next commands."""
    before, after = report.eval["before"], report.eval["after"]
    screen.line(
        "after",
        f"held-out loss {after.loss:.3f} ({after.loss - before.loss:+.3f}), perplexity {figures(after.perplexity)}",
        answer=True,
    )
    screen.line(
        "measured",
        f"{seconds_text(report.seconds)} in {count(report.steps)} steps, {short(report.tokens_per_second)} tok/s, "
        f"{count(report.trainable_params)} trainable parameters, peak memory {bytes_text(report.peak_memory_bytes)}",
        answer=True,
    )
    if report.predicted is not None:
        time, memory = report.predicted.seconds, report.predicted.peak_memory_bytes
        grown = report.memory_growth_bytes
        screen.line(
            "predicted",
            f"{seconds_text(time)}, actual {seconds_text(report.seconds)}{deviation(time, report.seconds)}; "
            f"memory {bytes_text(memory)}, actual growth {bytes_text(grown)}{deviation(memory, grown)}",
            answer=True,
        )
    if report.best is not None:
        screen.line(
            "best",
            f"held-out loss {report.best.loss:.3f} after step {report.best.step}: "
            f"{report.output}/checkpoint-{report.best.step}",
            answer=True,
        )
    screen.line("saved", report.output, answer=True)
    screen.line("page", f"{report.output}/{PAGE}", answer=True)
    name = report.output.rstrip("/").rpartition("/")[2]
    screen.command("next", shlex.join(["lorafit", "eval", report.output]))
    screen.command("", shlex.join(["lorafit", "merge", report.output, "-o", f"{name}-merged"]))
