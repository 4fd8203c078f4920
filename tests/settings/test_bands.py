import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.errors import RequestError
from lorafit.settings.bands import BANDS, Band, LayerChoice

depths = st.integers(min_value=3, max_value=2000)


@given(depths)
def test_bands_tile_every_depth(depth):
    parts = [BANDS[name].indices(depth) for name in ("low", "mid", "high")]
    assert all(parts)
    assert [i for part in parts for i in part] == list(range(depth))


@pytest.mark.parametrize(
    "depth, low, mid, high",
    [(12, (0, 3), (4, 8), (9, 11)), (32, (0, 10), (11, 23), (24, 31)), (3, (0, 0), (1, 1), (2, 2))],
)
def test_bands_at_known_depths(depth, low, mid, high):
    for name, (first, last) in (("low", low), ("mid", mid), ("high", high)):
        assert BANDS[name].indices(depth) == tuple(range(first, last + 1))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("all", range(12)), ("0-3", [0, 1, 2, 3]), ("0,2,5", [0, 2, 5]), ("8-", [8, 9, 10, 11]),
        ("first:4", [0, 1, 2, 3]), ("last:4", [8, 9, 10, 11]), ("low,high", [0, 1, 2, 3, 9, 10, 11]),
        (" 5 , 2 ", [2, 5]), ("high,11,10-11", [9, 10, 11]), ("0-0", [0]),
    ],
)  # fmt: skip
def test_choices(text, expected):
    assert LayerChoice(text).indices(12) == tuple(expected)


@pytest.mark.parametrize(
    "text", ["", "  ", "5-2", "hihg", "1,,2", "-3", "first:0", "last:", "a-b", "1.5", "low;high", "٣"]
)
def test_no_choice_at_all(text):
    with pytest.raises(RequestError):
        LayerChoice(text).indices(100)


@pytest.mark.parametrize(
    "text, depth",
    [("99", 12), ("3-12", 12), ("12-", 12), ("first:13", 12), ("high", 2), ("low", 1), ("mid", 2)],
)
def test_layers_that_are_not_there(text, depth):
    with pytest.raises(RequestError) as error:
        LayerChoice(text).indices(depth)
    assert "0" in error.value.hint or error.value.hint in (
        "--layers last:1",
        "--layers first:1",
        "--layers all",
    )


def test_a_near_miss_is_named():
    with pytest.raises(RequestError) as error:
        LayerChoice("hgih")
    assert "`high`" in error.value.hint


def test_bands_of_ones_own():
    ends = LayerChoice("ends", {"ends": "first:1,last:1"})
    assert ends.indices(12) == (0, 11)
    middle = LayerChoice("middle", {"middle": Band("middle", BANDS["mid"].start, BANDS["mid"].stop)})
    assert middle.indices(12) == BANDS["mid"].indices(12)


@given(st.text(max_size=12), st.integers(min_value=1, max_value=40))
def test_any_text_is_a_choice_or_an_error(text, depth):
    try:
        chosen = LayerChoice(text).indices(depth)
    except RequestError as error:
        assert error.message
    else:
        assert chosen and all(0 <= i < depth for i in chosen) and list(chosen) == sorted(set(chosen))
