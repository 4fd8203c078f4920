"""What `lorafit train` shows while it runs: on a terminal, and in a log."""

import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from lorafit.estimate import Timing
from lorafit.events import Evaluated, Note, Predicted, PrefixCache, Started, Stepped
from lorafit.screen import Screen, TrainView

SETTINGS = {"accumulate": 1, "batch_size": 8, "learning_rate": 1e-3, "scheduler": "linear"}


def watched(events, every=30.0, verbose=False):
    view = TrainView(Screen(verbose=verbose), every)
    view.start(events[0], SETTINGS)
    for event in events:
        view.on(event)
    view.close()


def started(notes=(), busy=""):
    """What a run of 40 steps says before its first one."""
    return [
        Started(40, 2, 320, 16, 8000, 4000), Predicted(10**8, 60.0, 1000, busy), *map(Note, notes),
        PrefixCache("off", "no layers are frozen"), Evaluated(0, 2.0, 100),
    ]  # fmt: skip


def step(number):
    return Stepped(number, 1, 1.5, 200, 100, 0.5, 5e-4, 1.0)


def test_a_log_has_a_line_at_each_evaluation_and_not_the_value_of_the_end(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    steps = [step(n) for n in range(1, 41)]
    watched([*started(), *steps[:20], Evaluated(20, 1.25, 100), *steps[20:], Evaluated(40, 1.125, 100)])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("  step ")]
    shape = r"  step       20 of 40: loss 1\.500, held out 1\.250, rate 0\.0005, 400 tok/s, \S+ s left"
    assert len(lines) == 1 and re.fullmatch(shape, lines[0])


def test_a_log_has_a_line_now_and_then(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    steps = [step(n) for n in range(1, 41)]
    watched([*started(), *steps])
    assert "  step " not in capfd.readouterr().err, "nothing within 30 s"
    watched([*started(), *steps], every=0.0)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("  step ")]
    assert len(lines) == 39, "each step but the last, whose loss is in the report"


def test_a_prediction_says_that_the_machine_was_busy(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    busy = Timing(1e-3, 1e-3, 0.1, 64, "one block timed", spread=0.4).busy
    watched(started(busy=busy))
    told = " ".join(capfd.readouterr().err.split())
    assert "peak memory 100 MB (the machine is busy: timings differ by 40 %, so the" in told
    watched(started(busy=Timing(1e-3, 1e-3, 0.1, 64, "one block timed", spread=0.1).busy))
    assert "busy" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [0, 3, 4, 30])
def test_a_prelude_has_at_most_fifteen_lines_and_says_what_it_leaves_out(capfd, monkeypatch, number):
    monkeypatch.setenv("COLUMNS", "80")
    notes = [
        f"note {n} is so long that it needs more than one line of a terminal of 80 columns"
        for n in range(number)
    ]
    watched(started(notes))
    text = capfd.readouterr().err
    assert len(text.strip().splitlines()) <= 15 and "before" in text
    shown = len(re.findall(r"note \d+ is", text))
    assert shown == number or f"{number - shown} more; --verbose" in text
    watched(started(notes), verbose=True)
    assert len(re.findall(r"note \d+ is", capfd.readouterr().err)) == number


def on_a_terminal(*arguments):
    """(what a command writes to a terminal of 80 columns, its exit code)."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafit", *map(str, arguments)], stdin=child, stdout=child, stderr=child,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
    )  # fmt: skip
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # its end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()), process.wait()


def short_run(tiny, pairs, folder):
    """The arguments of a run of six steps that is evaluated at every second one."""
    limits = ("--max-steps", 6, "--eval-steps", 2)
    return ("train", tiny("llama"), "--data", pairs, *limits, "-o", folder)


def test_a_terminal_shows_each_held_out_loss_once(tiny, pairs, tmp_path):
    words = short_run(tiny, pairs, tmp_path / "r")
    shown, code = on_a_terminal(*words)
    assert code == 0 and "\r" in shown, shown
    assert re.findall(r"held out +step (\d+)", shown) == ["2", "4"] and "\n  step " not in shown
    assert len(re.findall(r"held-out loss", shown)) == 2, "before and after"


def test_a_log_is_a_log_whatever_colours_are_asked_for(tiny, pairs, tmp_path):
    words = short_run(tiny, pairs, tmp_path / "r")
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", *map(str, words)], capture_output=True, text=True,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0 and "\r" not in done.stderr and "\x1b[2K" not in done.stderr
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
    assert re.findall(r"  step +(\d) of 6: loss \S+, held out", plain) == ["2", "4"]
    prelude = plain.partition("\n\n")[0].splitlines()
    assert prelude[-1].startswith("  before") and len(prelude) <= 15
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Rows have" in page and "<mark>" in page


@pytest.mark.parametrize("steps, epochs", [(87, 3), (120_000, 12)])
@pytest.mark.parametrize("width", range(30, 130, 5))
def test_a_narrow_terminal_loses_words_and_no_figure(width, steps, epochs):
    """The line of the bar, drawn at its widest in a terminal of that width."""
    stream = io.StringIO()
    screen = Screen()
    screen.talk = Console(file=stream, force_terminal=True, width=width, color_system=None)
    screen.live = True
    view = TrainView(screen)
    view.on(replace(started()[0], steps=steps, epochs=epochs))
    view._open()
    view.progress.update(view.task, completed=steps, epoch=epochs)
    fast = {"tokens": 1_234_000, "supervised_tokens": 1_200_000, "seconds": 1.0}
    view.on(replace(step(steps), epoch=epochs, loss=9.994, **fast))
    view.progress.refresh()
    view.close()
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n").split("\n")
    line = next(text for text in reversed(line) if "loss" in text)
    assert f"{steps}/{steps}" in line and "loss 9.994" in line and "…" not in line, line
    assert ("1.23 M tok/s" in line) == ("tok/s" in line) == ("speed" in view.parts), line
    assert width < 100 or ("1.20 M target tok/s" in line and "━" in line)


@pytest.mark.parametrize("width", [20, 30, 37, 40, 44, 53, 80])
def test_a_figure_keeps_its_unit(width):
    stream = io.StringIO()
    screen = Screen()
    screen.out = Console(file=stream, width=width, color_system=None)
    text = "it took 13 s (68 % more) at 9.27k tok/s, grew by 99.8 MB to 1.5 GB, 24.4 GB free, 2.5 M of 3 M"
    screen.line("measured", text, answer=True)
    lines = stream.getvalue().splitlines()
    assert " ".join(" ".join(lines).split()) == f"measured {text}"
    for line in lines:
        assert not re.search(r"\d$", line.rstrip()), line
