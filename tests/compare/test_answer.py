import re
from dataclasses import replace

import pytest

from lorafit.compare.answer import EQUAL, LOWEST, WORSE, Answer, ChoiceRow, _notes, taken, words
from lorafit.compare.files import COLUMNS, table_text
from lorafit.compare.page import compare_page
from lorafit.model.chart import map_of


def row(preset, layers, delta=0.0, error=0.0, verdict=LOWEST, seconds=10.0, gain=-0.5):
    return ChoiceRow(
        choice=f"{preset}-{layers}", preset=preset, layers=layers, rank=16, learning_rate=1e-3, seeds=(0,),
        runs=(f"{preset}-{layers}",), loss=1.0 + delta, spread=None, delta=delta, error=error, p=1.0, verdict=verdict,
        gain=gain, gain_error=0.01, accuracy=0.5, trainable_params=1000, adapter_bytes=4000, seconds=seconds,
        tokens_per_second=100.0, peak=10**9, growth=10**8, steps=20, fast=True,
    )  # fmt: skip


LOW = row("all", "all")


def test_the_lowest_loss_is_taken_where_nothing_is_near():
    choices = [LOW, row("ffn", "high", 0.1, 0.004, WORSE, 3.0)]
    assert taken(choices) == "all-all"
    first, second = words(choices, "all-all")
    assert (
        first
        == "`all` on `all` is best: held-out loss 1.0000 after 20 steps, 0.5000 ± 0.0100 below the base."
    )
    assert second == "`ffn` on `high` is worse beyond the noise of the held-out rows."


def test_what_is_within_one_standard_error_and_faster_is_taken():
    choices = [LOW, row("ffn", "high", 0.003, 0.004, EQUAL, 3.0), row("basic", "low", 0.2, 0.01, WORSE)]
    assert taken(choices) == "ffn-high"
    assert words(choices, "ffn-high")[0] == (
        "Take `ffn` on `high`: held-out loss 1.0030 after 20 steps, 0.5000 ± 0.0100 below the base. `all` on `all` is 0.0030 "
        "lower, but not beyond noise, and takes 3.3 × the time."
    )


def test_few_rows_do_not_make_a_worse_loss_as_good():
    """A large difference that is not significant is no reason to take the faster one; it is named."""
    choices = [LOW, row("ffn", "high", 1.3, 0.6, EQUAL, 2.0)]
    assert taken(choices) == "all-all"
    assert words(choices, "all-all")[1:] == [
        "`ffn` on `high` is 1.3000 higher, but not beyond noise, and takes 0.2 × the time."
    ]
    third = row("basic", "mid", 1.4, 0.9, EQUAL, 9.0)
    assert words([*choices, third], "all-all")[2] == (
        "Not distinguishable from the lowest loss on these rows: `basic` on `mid`."
    )


def test_a_choice_that_is_no_better_than_the_base_is_said():
    said = words([row("all", "all", gain=-0.01)], "all-all")[0]
    assert "not distinguishable from the base" in said
    assert "above the base" in words([row("all", "all", gain=0.3)], "all-all")[0]
    assert words([], "") == ["No candidate finished."]


def test_how_far_above_the_base_is_a_share_of_the_bases_loss():
    """A loss of 1.0 where the base has 0.8."""
    assert "(25 % above it)" in _notes([row("all", "all", gain=0.2)])[1]


def test_the_table_of_the_page_has_the_verdict_beside_the_loss_and_the_picture_says_what_its_cells_are():
    cells = [("ffn", "high"), ("ffn", "low"), ("basic", "high"), ("basic", "low")]
    choices = [row(*cell, 0.01 * n, 0.01, (LOWEST, EQUAL, WORSE, WORSE)[n]) for n, cell in enumerate(cells)]
    page = page_of(choices)
    head, first, second, third = (re.findall("<t[hd].*?>(.*?)</t[hd]>", r) for r in page.split("<tr>")[1:5])
    assert head[:4] == ["choice", "loss", "verdict", "to the lowest"]
    assert [shown[2] for shown in (first, second, third)] == ["lowest", "same", "worse"]
    assert second[3] == "+0.0100 ± 0.0100" and EQUAL not in page.partition("By held-out loss")[0]
    assert "each strategy in each band; greener" in page
    higher = replace(choices[0], choice="ffn-high-r8", loss=1.2)
    page = page_of([*choices, higher])
    assert "each strategy in each band, the lowest loss of its candidates; greener" in page
    assert ">1.000 ●</td>" in page and ">1.200</td>" not in page


def page_of(choices):
    answer = Answer("demo", "nowhere", 9, 99, 1.5, tuple(choices), "ffn-high", (), (), ())
    return compare_page(answer, map_of("demo"))


@pytest.mark.parametrize("name", ["<b>x</b>", "a&b"])
def test_names_are_escaped_on_the_page(name):
    choices = (replace(LOW, choice=name, runs=(name,)), row("ffn", "high", 0.1, 0.01, WORSE))
    answer = Answer("demo", "nowhere", 9, 99, 1.5, choices, name, ("`ffn` on `high` is best.",), (), ())
    page = compare_page(answer, map_of("demo"))
    assert (
        "<code>ffn</code> on <code>high</code> is best." in page
        and name not in page
        and "Loss and time" in page
        and "prefers-color-scheme: dark" in page
    )
    assert page.count("<h2>") >= 3 and "<script" not in page and "viewport" in page
    head, first, _ = table_text(answer).splitlines()
    assert head.split(",") == list(COLUMNS) and first.startswith(name)
