"""What is documented is executed: every command of the README, in its order, and its Python."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
FIGURE = re.compile(r"\d[\d.,]*|[╸━╺]+")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def shape(text: str) -> list[list[str]]:
    """The words of each line, figures apart: what a machine's speed may change."""
    return [FIGURE.sub("#", line).split() for line in text.splitlines() if line.strip()]


def words(text: str) -> str:
    """All words in a row; figures apart with their units, which a machine's speed and memory change,
    and with them where lines are broken."""
    text = re.sub(r"\d[\d.,]*\s*([kMGTB]B?|B|s|min|h|d)?(?![\w.])", "#", " ".join(text.split()))
    return re.sub(r"#( #)+", "#", text)


@pytest.mark.parametrize(
    "block", [body for kind, body in BLOCKS if kind == "console"], ids=lambda b: b.splitlines()[0][2:]
)
def test_every_console_block_says_what_the_command_says(shelf, block):
    command, _, shown = block.partition("\n")
    assert command.startswith("$ lorafit ")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", *shlex.split(command)[2:]], cwd=shelf, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    if command.startswith("$ lorafit plan"):
        assert words(done.stdout) == words(shown)
    elif "train" not in command and "eval" not in command:  # their words are the model's own
        assert shape(done.stdout) == shape(shown)
    elif "train" in command:
        assert [line[:1] for line in shape(shown)] == [line[:1] for line in shape(done.stdout)]
    else:
        for text in (shown, done.stdout):
            heads = {line[0] for line in shape(text)}
            assert {"#", "model", "base", "sample", "wanted", "adapter"} <= heads


def test_the_set_up_is_two_one_line_commands():
    shells = [body.strip() for kind, body in BLOCKS if kind == "sh"]
    assert shells == [
        "pip install -c constraints.txt . && lorafit train --preset ffn --layers high",
        "pip install -c constraints.txt '.[test]' && pytest",
    ]


def test_the_python_runs():
    code = next(body for kind, body in BLOCKS if kind == "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0 and done.stdout.startswith("69120 ('down_proj', 'gate_proj', 'up_proj')"), (
        done.stderr
    )


def test_the_preset_of_ones_own_is_one(tmp_path):
    from lorafit.settings.preset import load_preset

    (tmp_path / "mine.yaml").write_text(next(body for kind, body in BLOCKS if kind == "yaml"))
    preset = load_preset(str(tmp_path / "mine.yaml"))
    assert preset.choice().indices(12) == (0, 1, 10, 11) and preset.training["epochs"] == 2


def test_every_command_and_option_that_is_named_exists():
    from typer.main import get_command

    from lorafit.cli import app

    commands = get_command(app).commands
    flags = {
        flag for command in commands.values() for p in command.params for flag in (*p.opts, *p.secondary_opts)
    }
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)) <= flags | {"--help", "--version"}
    assert set(re.findall(r"`lorafit ([a-z]+)", prose)) <= set(commands)
