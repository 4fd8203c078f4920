"""What the tests share: tiny models on disk, rows to train on, the command line in-process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time, each on a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")


from hub_cache import hub  # noqa: F401  # a fixture that several files use

if TYPE_CHECKING:
    from processes import Forked


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the session's own."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family, made once."""
    from families import save_model

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_model(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompt/completion rows."""
    from random import Random

    from lorafit.demo.world import records

    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = records(Random(3))
    with path.open("w") as file:
        for _ in range(40):
            user, assistant = next(rows)["messages"]
            file.write(
                json.dumps({"prompt": user["content"] + "\n", "completion": assistant["content"]}) + "\n"
            )
    return path


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """`lorafit …` in a process of its own, without the seconds of its start."""
    from processes import Forked

    made = Forked(tmp_path_factory.mktemp("forked"))
    yield made
    made.close()


class Result:
    """What a command answered."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`lorafit …` in this process: exit code, stdout, stderr."""
    from lorafit.cli import app

    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        try:
            app([str(a) for a in arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return Result(code, out, err)

    return call


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The architectures that the zoo's sweep could not build, each with its reason."""
    unbuilt = getattr(sys.modules.get("test_zoo"), "UNBUILT", [])
    if unbuilt:
        terminalreporter.section(f"{len(unbuilt)} classes that transformers cannot build from their defaults")
        for line in unbuilt:
            terminalreporter.write_line(line)
