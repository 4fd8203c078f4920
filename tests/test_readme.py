"""What is documented is executed: the commands, the Python and the presets of README.md and lorafit/docs/*.md."""

import os
import re
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from lorafit.cli.help import FOLDER, TOPICS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(FOLDER / f"{topic}.md" for topic in TOPICS)]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
LEFT_OUT = "…"


def blocks(kind: str, text: str = README) -> list[str]:
    return [body for name, body in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL) if name == kind]


def words(text: str) -> str:
    """All words in a row, so that it does not matter where lines break; a figure with its unit is `#`: it is
    what a machine's speed and memory change, as is that it was busy."""
    plain = re.sub(r" \(the machine is busy:[^)]*\)", "", " ".join(text.split()))
    plain = re.sub(r"(?<![\w-])[+−-]?\d[\d.,]*\s*([kMGTB]B?|B|s|min|h|d)?(?![\w.])", "#", plain)
    return re.sub(r"#( #)+", "#", plain)


def stretches(shown: str) -> list[str]:
    """The lines between those that are left out, as words."""
    return [words(part) for part in re.split(rf"^{LEFT_OUT}$", shown, flags=re.MULTILINE)]


def shows(printed: str, shown: str) -> bool:
    """Whether all that is shown was printed, in its order, with nothing between but what is left out."""
    parts, text = stretches(shown), words(printed)
    if len(parts) == 1:
        return text == parts[0]
    if not text.startswith(parts[0]) or not text.endswith(parts[-1]):
        return False
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def lorafit(shelf, forked):
    """`lorafit …` in one folder, both streams together; a command that stands on several pages runs once."""
    printed: dict[str, str] = {}

    def run(command: str) -> str:
        if command not in printed:
            said, _, last = command.rpartition(" | ")
            done = forked.run(
                *shlex.split(last)[1:], cwd=shelf, env={**os.environ, "COLUMNS": "80"},
                said=f"{shlex.split(said)[1]}\n" if said else "", together=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            printed[command] = done.stdout
        return printed[command]

    return run


CONSOLE = [(name, block) for name, text in TEXTS.items() for block in blocks("console", text)]


@pytest.mark.parametrize("name, block", CONSOLE, ids=[f"{n}: {b.splitlines()[0][2:]}" for n, b in CONSOLE])
def test_every_console_block_shows_what_the_command_prints(lorafit, name, block):
    command, _, shown = block.partition("\n")
    assert re.match(r"\$ (echo \"[^\"]*\" \| )?lorafit ", command)
    printed = lorafit(command[2:])
    if "--samples" in command:  # which rows changed the most, and what the models answer, is theirs to say
        heads = {line.split()[0] for line in shown.splitlines() if re.match(r"  \w", line)}
        assert heads and heads <= {line.split()[0] for line in printed.splitlines() if line.strip()}
    else:
        assert shows(printed, shown), printed


def test_the_demo_ends_with_right_answers(lorafit):
    """The first run of anyone: most held-out rows, of which the base has none."""
    said = lorafit("lorafit train --preset ffn --layers high")
    reference, after = re.search(
        r"  reference  (.*?)\n  before .*\n  after      (.*?)\n  saved", said, re.DOTALL
    ).groups()
    assert reference.split() == after.split(), "what it says to a held-out row"
    shown = lorafit("lorafit eval runs/demo-ffn-high-1")
    base, adapter = re.findall(r"^  (?:base|runs/demo-ffn-high-1) .*% +([\d.]+)%", shown, re.MULTILINE)
    assert float(base) == 0.0 and float(adapter) > 60, shown


@pytest.mark.parametrize(
    "printed, shown, same",
    [
        ("a 1 b\nc 2.5 MB\n", "a 3 b c 7 GB", True),
        ("a\nb\nc\n", "a\nc\n", False),
        ("a\nb\nc\n", "a\n…\nc\n", True),
        ("a\nb\nc\n", "a\n…\nd\n", False),
        ("a\nb\nc\n", "b\n…\nc\n", False),
        ("a\nb\nc\n", "c\n…\na\n", False),
        ("3 s (+3 %)", "12 s (−39 %)", True),
    ],
)
def test_a_block_that_is_wrong_is_found(printed, shown, same):
    assert shows(printed, shown) is same


def test_the_set_up_is_two_one_line_commands():
    assert [body.strip() for body in blocks("sh")] == [
        "pip install -c constraints.txt . && lorafit train --preset ffn --layers high",
        "pip install -c constraints.txt '.[test]' && pytest",
    ]
    assert len(README.splitlines()) <= 250
    (pinned,) = re.findall(r"^(torch==\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"`pip install {pinned} --index-url" in README


PYTHON = [(name, code) for name, text in TEXTS.items() for code in blocks("python", text)]
PRINTED = [
    "69120 ('down_proj', 'gate_proj', 'up_proj') True",
    "4 17280",
    "['basic-high', 'ffn-high']",
    "there is no option `lr`",
    "runs/",
]  # first lines


@pytest.mark.long
def test_every_block_of_python_runs_and_prints_what_it_says(shelf, forked):
    for (name, code), shown in zip(PYTHON, PRINTED, strict=True):
        done = forked.python(code, shelf, {**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0 and done.stdout.startswith(shown), (name, done.stdout, done.stderr)
        assert done.stderr == "", name


def test_the_functions_that_are_named_exist():
    from importlib import import_module

    named = re.findall(r"`(lorafit(?:\.\w+)*)\.(\w+)\(", TEXTS["python.md"])
    assert len(named) >= 10
    for module, name in named:
        assert hasattr(import_module(module), name), f"{module}.{name}"


def test_the_preset_of_ones_own_is_one(tmp_path):
    from lorafit.settings import load_preset

    (tmp_path / "mine.yaml").write_text(blocks("yaml", TEXTS["presets.md"])[0])
    preset = load_preset(str(tmp_path / "mine.yaml"))
    assert preset.choice().indices(12) == (0, 1, 10, 11) and preset.training["epochs"] == 2


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_option_and_topic_that_is_named_exists(name):
    from typer.main import get_command

    from lorafit.cli import app

    commands = get_command(app).commands
    flags = {
        flag for command in commands.values() for p in command.params for flag in (*p.opts, *p.secondary_opts)
    }
    prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    used = re.sub(r"`(pip install|accelerate launch|torchrun)[^`]*`", "", prose)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", used)) <= flags | {"--help", "--version"}
    assert set(re.findall(r"(?:`|^    )lorafit ([a-z]+)", prose, re.MULTILINE)) <= set(commands)
    assert set(re.findall(r"`lorafit help ([a-z-]+)", prose)) <= set(TOPICS)


def test_every_page_is_a_topic_and_the_readme_links_it():
    assert {path.stem for path in FOLDER.iterdir()} == set(TOPICS)
    assert re.findall(r"\(lorafit/docs/([\w-]+)\.md\)", README) == list(TOPICS)
    for topic in TOPICS:
        assert TEXTS[f"{topic}.md"].startswith("# ")
        assert all(len(line) < 200 or "|" in line for line in TEXTS[f"{topic}.md"].splitlines())


def test_the_tables_of_the_evidence_are_made_from_the_rows_of_its_runs():
    spec = spec_from_file_location("tables", ROOT / "tests" / "benchmarks" / "evidence" / "tables.py")
    module = module_from_spec(spec)
    sys.modules["tables"] = module  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    made = module.tables()
    assert len(made["parameters"]) == 6
    for table in (table for tables in made.values() for table in tables):
        assert table in TEXTS["evidence.md"], table


def test_the_options_page_is_made_from_the_options():
    from lorafit.settings.options_page import options_page

    assert TEXTS["options.md"] == options_page(), "run `python -m lorafit.settings.options_page`"


def test_the_folders_of_the_code_page_exist():
    page = TEXTS["code.md"]
    for name in re.findall(r"`([\w/]+/|[\w/]+\.py)`", page):
        place = (
            ROOT if name in ("presets/", "lorafit/docs/") or name.startswith("tests/") else ROOT / "lorafit"
        )
        assert (place / name).exists(), name
    shown = set(re.findall(r"`(\w+)(?:/|\.py)`", page.partition("| to change")[0]))
    package = ROOT / "lorafit"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders <= shown, folders - shown


def test_help_shows_a_topic_and_lists_them(run):
    listed = run("help").out
    assert all(topic in listed for topic in TOPICS) and "lorafit help presets" in listed
    assert run("help", "data").out == TEXTS["data.md"]  # to a pipe: the file itself
    assert set(run("help", "--json").document["topics"]) == set(TOPICS)
    wrong = run("help", "daat")
    assert wrong.code == 2 and "no topic `daat`" in wrong.err and "did you mean `data`" in wrong.err


def test_help_is_laid_out_on_a_terminal(monkeypatch, capsys):
    from rich.console import Console

    from lorafit.screen import Screen, show_topic

    screen = Screen()
    screen.out = Console(force_terminal=True, width=60)
    show_topic(screen, TEXTS["merge.md"])
    shown = capsys.readouterr().out
    assert "\x1b[" in shown and "# Merging" not in shown and "Pushing" in shown
