"""What all commands show: texts of people's data on a terminal, in its columns, as they are."""

import io

import pytest
from rich.cells import cell_len

from lorafit.errors import RequestError
from lorafit.screen.console import Screen, clip, table_of
from lorafit.screen.data import _show_piece


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setenv("COLUMNS", "60")
    return Screen()


def test_an_escape_sequence_in_a_text_is_shown_and_not_done(screen, monkeypatch):
    text = "a\x1b[2Jb\x9b31m"
    assert clip(text) == "a␛[2Jb�31m"
    screen.error(RequestError(f"`{text}` is wrong", f"not {text}"))
    screen.note(text)
    said = screen.talk.file.getvalue()
    assert said.count("a␛[2Jb") == 3 and "a␛[2Jb" in said and "\x1b" not in said and "hint: not a␛" in said


def test_a_name_with_colons_is_no_picture(screen):
    screen.error(RequestError("`uonlp/CulturaX:id:train` is not here"))
    table = table_of("data")
    table.add_row("CulturaX:id:train")
    screen.answer(table)
    screen.answer("CulturaX:id:train")
    assert "CulturaX:id:train" in screen.talk.file.getvalue()
    assert screen.out.file.getvalue().count("CulturaX:id:train") == 2


@pytest.mark.parametrize("text", ["灯" * 150, "lamp " * 30])
def test_a_text_is_cut_by_the_columns_it_takes(text):
    assert clip(text, 400) == text.strip()
    cut = clip(text, 100)
    assert cut.endswith("…") and 97 <= cell_len(cut) <= 100


def test_no_character_of_a_wide_row_is_lost(screen):
    text = "".join(chr(0x4E00 + n) for n in range(60))
    _show_piece(screen, text, True, answer=True)
    lines = screen.out.file.getvalue().splitlines()
    assert "".join(line.partition("┃ ")[2] for line in lines) == text
    assert all(cell_len(line) <= 60 for line in lines)


def test_a_long_wide_row_keeps_its_beginning_and_its_end(screen):
    text = "".join(chr(0x4E00 + n) for n in range(600))
    _show_piece(screen, text, False, answer=True)
    *head, tail = [line.partition("│ ")[2] for line in screen.out.file.getvalue().splitlines()]
    assert len(head) == 2 and text.startswith("".join(head))
    assert tail.startswith("…") and text.endswith(tail[1:]) and len(tail) > 15
