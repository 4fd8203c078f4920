"""What `lorafit train` shows while it runs: on a terminal, and in a log."""

import os
import pty
import re
import subprocess
import sys

import pytest

from lorafit.events import Evaluated, Note, Predicted, PrefixCache, Started, Stepped
from lorafit.screen import Screen, TrainView

SETTINGS = {"accumulate": 1, "batch_size": 8, "learning_rate": 1e-3, "scheduler": "linear"}


def watched(events, every=30.0, verbose=False):
    view = TrainView(Screen(verbose=verbose), every)
    view.start(events[0], SETTINGS)
    for event in events:
        view.on(event)
    view.close()


def started(notes=()):
    """What a run of 40 steps says before its first one."""
    return [
        Started(40, 2, 320, 16, 8000, 4000), Predicted(10**8, 60.0, 1000), *map(Note, notes),
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
