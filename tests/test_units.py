import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.units import (
    bytes_text,
    compared,
    deviation,
    figures,
    index_ranges,
    layers_text,
    percent,
    seconds_text,
    short,
)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (950, "950"), (41_234, "41.2k"), (999_999, "1.00 M"), (2_525_184, "2.53 M"),
     (70_553_706_496, "70.6 B"), (999.6, "1.00k")],
)  # fmt: skip
def test_short(value, text):
    assert short(value) == text


def test_sizes_and_times():
    assert bytes_text(141e9) == "141 GB" and bytes_text(512) == "512 B" and bytes_text(15e6) == "15.0 MB"
    assert [seconds_text(s) for s in (0.84, 21, 250, 11_100, 187_200)] == [
        "0.8 s", "21 s", "4 min 10 s", "3 h 05 min", "2 d 4 h",
    ]  # fmt: skip
    assert seconds_text(59.7) == "1 min 00 s"
    assert percent(27, 1000) == "2.7 %" and figures(0.0043, 2) == "0.0043"


@given(st.lists(st.integers(0, 500), unique=True).map(sorted))
def test_ranges_say_every_index(indices):
    said = []
    for part in index_ranges(tuple(indices)).split(", "):
        if part:
            first, _, last = part.partition("–")
            said += range(int(first), int(last or first) + 1)
    assert said == indices


def test_a_deviation_is_of_the_actual_from_the_predicted():
    assert deviation(3.6, 3.7) == " (+3 %)" and deviation(16, 9.8) == " (−39 %)"
    assert deviation(5, 5) == " (+0 %)" and deviation(0.0, 3.0) == ""
    assert (
        compared(3.6, 3.7) == " (3 % more than predicted)"
        and compared(16, 9.8) == " (39 % less than predicted)"
    )
    assert compared(5, 5.01) == " (as predicted)" and compared(0.0, 3.0) == ""


def test_one_layer_and_several():
    assert layers_text((4,)) == "layer 4" and layers_text((0, 1, 2, 5)) == "layers 0–2, 5"
